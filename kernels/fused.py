"""The public Triton ops, named as in ``reference`` and ``torch_ops``."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastgpt.kernels import block, costs
from fastgpt.kernels._host import dropout_seed as dropout_seed
from fastgpt.kernels.adamw import accumulate as accumulate
from fastgpt.kernels.reference import OPS, OPS_OF_A_BLOCK

if TYPE_CHECKING:  # for the signatures; tests/model/test_dispatch.py checks that they are equal
    from fastgpt.kernels.reference import *  # noqa: F403

for _name, _file in OPS.items():
    globals()[_name] = getattr(import_module(f"fastgpt.kernels.{_file}"), _name)

costs.publish()


_IN_A_BLOCK = tuple(globals()[_name] for _name in OPS_OF_A_BLOCK)


def block_kernels(x: Tensor, *ops: Any) -> ModuleType | None:
    """The module that runs a whole block of ``ops``; None unless they are the Triton ops."""
    return block if ops == _IN_A_BLOCK else None
