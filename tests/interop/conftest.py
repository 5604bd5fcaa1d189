"""Fixtures for the tests of transformers' models."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from fastgpt.interop import transformers as fast


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """For each call of the attention op, which of causal, key_lengths and doc_start it got."""
    seen: list[str] = []

    def spied(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            given = [name for name in ("key_lengths", "doc_start") if kwargs.get(name) is not None]
            seen.append(" ".join((["causal"] if kwargs.get("causal", True) else []) + given))
            return op(*args, **kwargs)

        return call

    for name in ("attention", "attention_qkvpacked"):
        monkeypatch.setattr(fast.ops, name, spied(getattr(fast.ops, name)))
    return seen
