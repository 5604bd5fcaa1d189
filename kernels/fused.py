"""The public Triton ops under the names of ``reference`` and ``torch_ops``."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

from fastgpt.kernels import block, costs
from fastgpt.kernels._host import dropout_seed as dropout_seed
from fastgpt.kernels.reference import OPS

if TYPE_CHECKING:  # the signatures, which tests/model/test_ops.py compares
    from fastgpt.kernels.reference import *  # noqa: F403

for _name, _file in OPS.items():
    globals()[_name] = getattr(import_module(f"fastgpt.kernels.{_file}"), _name)

costs.publish()


def block_kernels(x: Tensor) -> ModuleType:
    """What takes the ops of a transformer block together."""
    return block
