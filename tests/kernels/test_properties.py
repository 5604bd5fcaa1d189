"""Every op on inputs drawn by hypothesis (shapes, strides, dtypes, options) against the plain op,
by ``parity``'s rule for few elements. 30 fixed cases per op by default; for more, random ones:

    pytest --hypothesis-profile=large tests/kernels/test_properties.py

CPU only, where kernels are interpreted: a GPU would compile a kernel for nearly every case.
"""

from functools import partial
from typing import Any

import pytest
import torch

from fastgpt.kernels import fused, reference, torch_ops
from tests.kernels.every_op import CASES
from tests.kernels.test_adamw import Buffers
from tests.tools.draws import Draws
from tests.tools.parity import assert_parity, randn

hypothesis = pytest.importorskip("hypothesis", reason="needs the extra test")
st = pytest.importorskip("hypothesis.strategies", reason="needs the extra test")

both = pytest.mark.parametrize("ops", [fused, torch_ops], ids=["fused", "torch_ops"])


@both
@pytest.mark.parametrize("op", [op for op in CASES if op != "adamw"])
@hypothesis.given(data=st.data())
def test_parity(data: Any, op: str, ops: Any) -> None:
    draws, drawn = Draws(data.draw, drops=ops is fused), CASES[op].drawn  # torch_ops' masks differ
    assert drawn is not None
    call, inputs = drawn(draws)
    plain = partial(call, reference)
    shape = plain(*(x.double() for x in inputs)).shape
    names = [f"input {i}" for i in range(len(inputs))] if CASES[op].calls else []
    assert_parity(partial(call, ops), plain, plain, inputs, draws.gradient(shape), names, few=True)


@both
@hypothesis.given(data=st.data())
def test_adamw(data: Any, ops: Any) -> None:
    """A few updates against PyTorch's optimizer."""
    draws = Draws(data.draw)
    start = randn([draws.size(2000)], torch.float32, "cpu", "contiguous")
    rounded = draws.one_of(None, torch.float16, torch.bfloat16)
    options = dict(
        betas=draws.one_of((0.9, 0.95), (0.9, 0.999), (0.0, 0.5)),
        eps=draws.one_of(1e-8, 1e-3),
        weight_decay=draws.one_of(0.0, 0.1),
    )
    lr, clip = draws.one_of(1e-4, 1e-2), draws.one_of(None, 0.3)
    ours = Buffers(start, rounded)
    params = [start.clone(), start.double()]
    theirs = [torch.optim.AdamW([p], lr=lr, **options) for p in params]
    for _ in range(draws.size(4)):
        grad = randn(start.shape, torch.float32, "cpu", "contiguous")
        factor = None if clip is None else torch.tensor(clip)
        skipped = draws.flag()
        ours.update(ops, grad, lr, **options, clip=factor, skip=torch.tensor(float(skipped)))
        for param, optimizer in zip(params, theirs, strict=True):
            param.grad = (grad if clip is None else grad * clip).to(param.dtype)
            if not skipped:
                optimizer.step()
    common, exact = params
    error = (ours.param.double() - exact).abs().max()
    assert error <= 2 * (common.double() - exact).abs().max() + 1e-6
    if ours.rounded is not None and ours.step.item():
        assert torch.equal(ours.rounded, ours.param.to(ours.rounded.dtype))
