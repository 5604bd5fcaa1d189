"""kernels/configs.py: which entry of the table a launch takes."""

import itertools

import pytest
import torch

from fastgpt.kernels import configs
from fastgpt.kernels.configs import ANY, Key, lookup

BF16 = torch.bfloat16


def test_the_order_of_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options match before architecture, then dtype, size and kernel; no match is an error."""
    keys = [
        Key("op", "k", "sm_90", "half", 64, ("a", "b")),
        Key("op", ANY, ANY, ANY, ANY, ("a",)),
        Key("op", "k", "sm_90", "half", 64),
        Key("op", ANY, "sm_90", "half", 64),
        Key("op", "k", "sm_90", "half", ANY),
        Key("op", "k", "sm_90", ANY, 64),
        Key("op", "k", "gpu", "half", 64),
        Key("op", "k", ANY, "half", 64),
    ]
    table = {key: number for number, key in enumerate(keys)}
    monkeypatch.setattr(configs, "TABLE", table)
    for number, key in enumerate(keys):
        assert lookup.__wrapped__("op", "k", 90, BF16, 64, ("a", "b")) == number
        del table[key]
    with pytest.raises(KeyError, match="op.*90.*bfloat16"):
        lookup.__wrapped__("op", "k", 90, BF16, 64, ("a", "b"))
    table[keys[6]] = 6
    with pytest.raises(KeyError):
        lookup.__wrapped__("op", "k", None, BF16, 64)  # the interpreter is not a GPU


def test_attention_has_a_line_for_every_launch() -> None:
    kernels, dtypes = ("fwd", "bwd_dq", "bwd_dkdv"), (torch.float32, torch.float16, BF16)
    given = [
        (*dropout, *mask)
        for dropout in ((), ("dropout",))
        for mask in ((), ("documents",), ("lengths",))
    ]
    for capability, kernel, dtype, size, options in itertools.product(
        (None, 80, 86, 89, 90, 100, 120), kernels, dtypes, (16, 32, 64, 128, 256), given
    ):
        config = lookup("attention", kernel, capability, dtype, size, options)
        # Elsewhere products do not overlap with their own program's softmax, or Triton arranges it.
        pipelined = kernel == "fwd" and dtype != torch.float32 and capability in (None, 90)
        assert bool(config.PIPELINED_PV) == pipelined


def test_equal_configurations_of_two_kinds_keep_their_names() -> None:
    rows, parts = configs.WholeRows(8, 4), configs.AttentionDecodeSum(8, 4)
    assert rows == parts  # as tuples, hence also as cache keys
    both = {"num_warps": 4, "enable_fp_fusion": True}
    assert configs.launch(rows) == {"BLOCK_M": 8, **both}
    assert configs.launch(parts) == {"PARTS": 8, **both}
