"""``fused`` for GPUs of compute capability 7.5, whose tensor cores Triton does not use.

Attention over whole sequences uses PyTorch. The launch table selects cuBLAS for the products of
``linear``, ``mlp`` and the loss; the rest of these ops, and all other ops, are Triton kernels.
PyTorch's generator draws every dropout mask, since its attention takes no seed.
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
