"""Adapters of peft and loralib on every linear layer: gradients, merging, saving and loading match
a plain model with the same adapters. ``test_module_tree.py`` has hand-written adapters that need
neither library."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastgpt import GPT
from tests.model.test_module_tree import CHANGES, assert_same_gradients, changed, replaced, tokens

LAYERS = ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
TARGETS = {"layers": LAYERS, "all": [*LAYERS, "lm_head"]}
IDX, NEXT = tokens()


def logits(model: Any, training: bool = False) -> torch.Tensor:
    found: torch.Tensor = model.train(training)(IDX, NEXT, return_logits=True)[0]
    return found.detach()


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_peft(targets: list[str], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")

    def adapted(model: nn.Module) -> Any:
        torch.manual_seed(5)
        keys = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        return peft.get_peft_model(model, keys)

    ours, plain = map(adapted, changed(CHANGES["nothing"]))
    assert_same_gradients(ours, plain, IDX, NEXT)
    before = logits(ours)
    assert_close(before, plain.eval()(IDX, NEXT)[0])
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(changed(CHANGES["nothing"])[0], tmp_path)
    assert_close(logits(loaded), before)
    for model in (ours, plain):
        # Merging into lm_head also changes the token embedding, which is tied to it.
        model.merge_adapter()
    assert_close(logits(ours), plain.eval()(IDX, NEXT)[0])
    if "lm_head" not in targets:
        assert_close(logits(ours), before)
    ours.unmerge_adapter()
    assert_close(logits(ours), before)
    merged = loaded.merge_and_unload()
    assert type(merged) is GPT
    assert_close(logits(merged), plain.eval()(IDX, NEXT)[0])


def _loralib(name: str, old: nn.Linear) -> nn.Module:
    import loralib

    size = old.in_features, old.out_features
    if name == "c_attn":
        new = loralib.MergedLinear(
            *size, r=2, enable_lora=[True, False, True], bias=old.bias is not None
        )
    else:
        new = loralib.Linear(*size, r=2, bias=old.bias is not None)
    new.load_state_dict(old.state_dict(), strict=False)
    nn.init.normal_(new.lora_B, std=0.2)
    return new


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_loralib(targets: list[str]) -> None:
    loralib = pytest.importorskip("loralib", reason="needs the extra test")

    def change(model: Any) -> None:
        for name in targets:
            replaced(name, functools.partial(_loralib, name))(model)
        loralib.mark_only_lora_as_trainable(model)

    ours, plain = changed(change)
    assert_same_gradients(ours, plain, IDX, NEXT)
    unmerged = logits(ours, training=True)
    merged = logits(ours)  # eval() merges the adapters into the weights, train() takes them out
    assert_close(merged, unmerged)
    assert_close(merged, plain.eval()(IDX, NEXT)[0])
    assert_close(logits(ours, training=True), unmerged)
    fresh, _ = changed(change)
    for name, p in fresh.named_parameters():
        if "lora_" in name:
            nn.init.zeros_(p)
    saved = loralib.lora_state_dict(ours)
    assert saved and all("lora_" in name for name in saved)
    fresh.load_state_dict(saved, strict=False)
    assert_close(logits(fresh), merged)
