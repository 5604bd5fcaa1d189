"""``fused`` for GPUs whose tensor cores Triton leaves idle, those of compute capability 7.5.

Attention over whole sequences is PyTorch's. The products of ``linear``, ``mlp`` and the loss are
cuBLAS's by the launch table, and all that lies around them is Triton's. PyTorch's generator draws
every mask, as its attention takes no seed.
"""

from typing import TYPE_CHECKING

from fastgpt.kernels import fused, torch_ops
from fastgpt.kernels.fused import accumulate as accumulate
from fastgpt.kernels.reference import OPS, OPS_OF_TENSOR_CORES
from fastgpt.kernels.torch_ops import dropout_seed as dropout_seed

if TYPE_CHECKING:
    from fastgpt.kernels.reference import *  # noqa: F403

for _name in OPS:
    globals()[_name] = getattr(torch_ops if _name in OPS_OF_TENSOR_CORES else fused, _name)
