"""Training transformers' GPT-2 on ``fastgpt``'s layers with the Trainer, peft and TRL.

Needs the extra trl; tests of a missing package are skipped.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt.interop import transformers as fast
from tests.interop.small_transformers import VOCABULARY, close, gpt2, losses, patched, transformers

pytest.importorskip("accelerate", reason="needs the extra trl")

WORDS = [f"w{i}" for i in range(VOCABULARY)]


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "optim": "sgd",  # Adam would amplify small differences
        "learning_rate": 0.1,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **more,
    }


def samples(n: int) -> list[dict[str, list[int]]]:
    """Sequences of many lengths, so that batches have padding and differ in their token counts."""
    g = torch.manual_seed(4)
    lengths = torch.randint(3, 20, (n,), generator=g).tolist()
    rows = [torch.randint(1, VOCABULARY, (length,), generator=g).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row} for row in rows]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    def padded(name: str, value: int) -> Tensor:
        tensors = [torch.tensor(row[name]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(tensors, True, value)

    ids = padded("input_ids", 0)
    return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": (ids > 0).long()}


def trained(model: Any, folder: Path, **more: Any) -> tuple[list[float], list[Tensor]]:
    """Losses and final parameters of a training run."""
    arguments = transformers.TrainingArguments(**options(folder, **more))
    trainer = transformers.Trainer(
        model, arguments, train_dataset=samples(16), data_collator=collate
    )
    trainer.train()
    seen = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return seen, [p.detach() for p in model.parameters()]


def same(found: Any, expected: Any) -> None:
    (losses_, weights), (expected_losses, expected_weights) = found, expected
    assert losses_ == pytest.approx(expected_losses, rel=1e-4)
    for got, wanted in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-3)


def test_the_trainer_and_accumulation(tmp_path: Path) -> None:
    """One batch of 8 equals 8 batches of 1, and both equal transformers' own layers."""
    whole = dict(per_device_train_batch_size=8)
    parts = dict(per_device_train_batch_size=1, gradient_accumulation_steps=8)
    expected = trained(gpt2("sdpa"), tmp_path, **whole)
    same(trained(patched(), tmp_path, **whole), expected)
    same(trained(patched(), tmp_path, **parts), expected)


def test_half_precision_and_undo(tmp_path: Path) -> None:
    """undo() also works after the trainer has wrapped ``forward`` for autocast."""
    model = patched()
    seen, _ = trained(model, tmp_path, bf16=True, gradient_checkpointing=True)
    assert all(0.0 < loss < 10.0 for loss in seen)
    fast.undo(model)
    plain = gpt2("sdpa").train()
    plain.load_state_dict(model.state_dict())
    if hasattr(model, "_original_forward"):
        del model.forward
    assert torch.equal(losses(model.train()).logits, losses(plain).logits)


# -- peft


@pytest.mark.parametrize("first", ["apply_to", "peft"])
def test_an_adapter(first: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra trl")
    config = peft.LoraConfig(
        r=4,
        target_modules=["c_attn", "c_fc", "c_proj", "lm_head"],
        modules_to_save=["ln_f"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        fan_in_fan_out=True,
    )

    def adapted(patch: str) -> Any:
        model = gpt2("sdpa")
        if patch == "apply_to":
            fast.apply_to(model)
        torch.manual_seed(5)
        model = peft.get_peft_model(model, config)
        if patch == "peft":
            fast.apply_to(model)
        return model

    model, plain = adapted(first), adapted("none")
    same(trained(model, tmp_path), trained(plain, tmp_path))
    merged = fast.undo(model).merge_and_unload()
    assert not any("forward" in module.__dict__ for module in merged.modules())
    with torch.no_grad():
        x = torch.arange(10)[None]
        close(merged.eval()(x).logits, plain.merge_and_unload().eval()(x).logits)


# -- TRL


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, WORDS[1])
    own = tokenizers.Tokenizer(model)
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token=WORDS[0], eos_token=WORDS[2], unk_token=WORDS[1]
    )


def text(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def supervised(trl: Any, model: Any, folder: Path) -> Any:
    rows = [{"text": text(row["input_ids"])} for row in samples(8)]
    arguments = trl.SFTConfig(**options(folder, max_length=24))
    return trl.SFTTrainer(
        model, arguments, train_dataset=dataset(rows), processing_class=tokenizer()
    )


def reward(trl: Any, model: Any, folder: Path) -> Any:
    ids = [row["input_ids"] for row in samples(8)]
    rows = [{"chosen": text(a), "rejected": text(b)} for a, b in zip(ids, ids[::-1], strict=True)]
    arguments = trl.RewardConfig(**options(folder, max_length=24))
    return trl.RewardTrainer(
        model, arguments, train_dataset=dataset(rows), processing_class=tokenizer()
    )


def grpo(trl: Any, model: Any, folder: Path) -> Any:
    rows = [{"prompt": text(row["input_ids"][:5])} for row in samples(8)]
    arguments = trl.GRPOConfig(**options(folder, num_generations=2, max_completion_length=6))

    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(completion.split()))) for completion in completions]

    return trl.GRPOTrainer(
        model, length, arguments, train_dataset=dataset(rows), processing_class=tokenizer()
    )


def dataset(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(rows)


@pytest.mark.parametrize(
    "build, kind",
    [
        (supervised, "GPT2LMHeadModel"),
        (reward, "GPT2ForSequenceClassification"),
        (grpo, "GPT2LMHeadModel"),
    ],
)
def test_trl(build: Callable[..., Any], kind: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs the extra trl")
    found = []
    for patch in (True, False):
        model = gpt2("sdpa", kind, num_labels=1, tie_word_embeddings=True)
        if patch:
            fast.apply_to(model)
        torch.manual_seed(6)
        trainer = build(trl, model, tmp_path)
        trainer.train()
        assert trainer.model is model
        seen = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(seen) == 2
        found.append((seen, [p.detach() for p in model.parameters()]))
    same(*found)
