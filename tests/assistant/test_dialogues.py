"""Preparing a data set of dialogues, and training on the answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastgpt.assistant import template
from fastgpt.assistant.dialogues import DialogueSource
from fastgpt.assistant.windows import DialogueWindows
from fastgpt.assistant.words import main as words_main
from fastgpt.assistant.words import words, write_dialogues
from fastgpt.cli import main as cli
from fastgpt.data.batches import Batches, token_files
from fastgpt.data.manifest import read_manifest
from fastgpt.data.prepare import prepare
from fastgpt.tokenizer import CharTokenizer, ChatTokenizer, saved_tokenizer
from fastgpt.training.trainer import Trainer
from tests.tools.small_runs import assert_same, data_set, quiet, small_config, trained

DATA = words(lines=50, train=60, heldout=20)
CHAT = ChatTokenizer(CharTokenizer.from_texts([words(lines=2000).base]))
BEGIN = CHAT.begin


def dialogues(root: Path, tokenizer: ChatTokenizer = CHAT) -> Path:
    """A data set of dialogues in ``root/chat``."""
    write_dialogues(DATA.train, root / "d.jsonl")
    prepare(DialogueSource(root / "d.jsonl"), tokenizer, root / "chat", val_share=0.2)
    return root / "chat"


def chat_config(root: Path, **changes: Any) -> Any:
    keys = {"dataset": "chat", "block_size": 40, "dropout": 0.0, **changes}
    return small_config(root, **keys)


def test_a_data_set_of_whole_dialogues(tmp_path: Path) -> None:
    folder = dialogues(tmp_path)
    manifest, tokenizer = read_manifest(folder), saved_tokenizer(folder)
    assert manifest is not None and manifest.dialogues
    assert tokenizer is not None and tokenizer.fingerprint == CHAT.fingerprint
    assert sum(split.documents for split in manifest.splits.values()) == len(DATA.train)
    found = {}
    for split in manifest.splits:
        (file,) = token_files(folder, split)
        found[split] = "<|dialogue|>" + tokenizer.decode(file.tokens).replace("<|dialogue|>", "", 1)
    whole = [CHAT.decode(template.encode(CHAT, dialogue)[0]) for dialogue in DATA.train]
    for split, text in found.items():  # each dialogue once, in one split, in the original order
        mine = [dialogue for dialogue in whole if dialogue in text]
        assert "".join(mine) == text and len(mine) == manifest.splits[split].documents
    # Dialogues need a ChatTokenizer; with it, plain text gives an ordinary data set.
    with pytest.raises(TypeError, match="tokenizer must be a ChatTokenizer for dialogues, got ch"):
        prepare(DialogueSource(tmp_path / "d.jsonl"), CHAT.base, tmp_path / "other")
    (tmp_path / "base.jsonl").write_text('{"text": "abba"}\n{"text": "baab"}\n')
    argv = ["prepare", f"--input={tmp_path / 'base.jsonl'}", f"--tokenizer={folder}"]
    assert cli.main([*argv, f"--out_dir={tmp_path / 'base'}", "--val_share=0.5"]) == 0
    of_text = read_manifest(tmp_path / "base")
    assert of_text is not None and not of_text.dialogues and of_text.vocab_size == CHAT.vocab_size


GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "is not JSON"),
        (json.dumps({"messages": GOOD["messages"][:1]}), "messages has no answer"),
        (
            json.dumps({"messages": [*GOOD["messages"], {"role": "user", "content": "a?"}]}),
            "messages[2].content: text has '?' at position 1",
        ),
    ],
)
def test_an_error_names_file_line_and_field(
    line: str, reason: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "d.jsonl").write_text("\n".join([json.dumps(GOOD)] * 20 + [line]))
    CharTokenizer.from_texts("ab").save(tmp_path / "meta.pkl")
    argv = ["prepare", f"--dialogues={tmp_path / 'd.jsonl'}", f"--tokenizer={tmp_path}"]
    error = refused(*argv, f"--out_dir={tmp_path / 'chat'}")
    assert error.startswith(f"error: line 21 of the input {tmp_path / 'd.jsonl'}")
    assert reason in error


def test_wrong_arguments(tmp_path: Path, refused: Callable[..., str]) -> None:
    write_dialogues(DATA.train, tmp_path / "d.jsonl")
    given = f"--dialogues={tmp_path / 'd.jsonl'}"
    for argv, reason in (
        ([given, f"--input={tmp_path}"], "give --input or --dialogues, not both"),
        ([f"--dialogues={tmp_path}"], "are not a file"),
        ([given, "--end_of_text=a"], "--end_of_text=a has no use"),
        ([given, "--text_key=text"], "--text_key=text has no use: dialogues are under messages"),
    ):
        assert reason in refused("prepare", *argv, f"--out_dir={tmp_path / 'chat'}")


def test_the_words_go_to_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        words_main([str(tmp_path / "file")])
    assert f"error: out_dir must be a folder, but {tmp_path / 'file'} is" in capsys.readouterr().err


@pytest.mark.parametrize("length", [12, 41, 400])
def test_windows(tmp_path: Path, length: int) -> None:
    (file,) = token_files(dialogues(tmp_path), "val")
    tokens = file.tokens
    windows = DialogueWindows(tokens, length, BEGIN, tokens[:0])
    starts = np.flatnonzero(tokens == BEGIN)
    assert windows.too_long == sum(n > length for n in np.diff([*starts, len(tokens)]))
    if length == 12:  # shorter than a question
        assert len(windows) == 0
        return
    assert len(windows) == len(starts)
    rows = windows[np.arange(len(windows))]
    targets = windows.targets(rows)
    for row, target, start in zip(rows, targets, starts, strict=True):
        inside = min(length, len(tokens) - start)
        assert np.array_equal(row[:inside], tokens[start : start + inside])
        assert (row[inside:] == BEGIN).all() and (target[max(inside - 1, 0) :] == -1).all()
        # Find the answers in the decoded text, also those cut off by the end of the window.
        said = CHAT.decode(row).split("<|assistant|>")[1:]
        answers = [text.partition("<|end|>") for text in said]
        assert CHAT.decode(target[target != -1]) == "".join(text + end for text, end, _ in answers)


def test_what_is_cut_off_is_said(tmp_path: Path) -> None:
    dialogues(tmp_path)
    batches = Batches(tmp_path / "chat", 2, 400, "cpu", 0)
    assert batches.of_dialogues and batches.note is None
    note = Batches(tmp_path / "chat", 2, 40, "cpu", 0).note
    too_long = sum(len(template.encode(CHAT, dialogue)[0]) > 41 for dialogue in DATA.train)
    assert note == (  # counts both splits
        f"{too_long} dialogues are longer than block_size=40 tokens: their ends are cut off"
    )
    with pytest.raises(ValueError, match="train.bin has no dialogue with an answer within block_s"):
        Batches(tmp_path / "chat", 2, 8, "cpu", 0)


@pytest.mark.parametrize("shard_tokens", [17, 300])
def test_a_file_may_end_within_a_dialogue(tmp_path: Path, shard_tokens: int) -> None:
    """Batches and the note on cut-off dialogues are the same as for a single file."""
    source = DialogueSource(dialogues(tmp_path).parent / "d.jsonl")
    prepare(source, CHAT, tmp_path / "cut", val_share=0.2, shard_tokens=shard_tokens)
    assert len(token_files(tmp_path / "cut", "train")) > 5
    for block_size in (40, 200):
        whole, cut = (Batches(tmp_path / f, 32, block_size, "cpu", 0) for f in ("chat", "cut"))
        assert whole.note == cut.note
        for split in ("train", "val"):
            assert_same(cut.next(split), whole.next(split))


def test_micro_batches_weigh_by_their_answers(tmp_path: Path) -> None:
    """8 micro-batches of 1 dialogue give the same updates as 1 of 8, although answers differ in
    length; an evaluation is the mean over all its targets."""
    dialogues(tmp_path)
    states = []
    for steps, size in ((1, 8), (8, 1)):
        trainer = Trainer(
            chat_config(tmp_path, gradient_accumulation_steps=steps, batch_size=size, max_iters=3),
            quiet(),
        )
        assert trainer.config.document_mask
        evaluated = trainer.evaluate()["val"]
        batches = list(trainer.batches.evaluation("val", trainer.config.eval_iters))
        with torch.no_grad():
            sums = [
                F.cross_entropy(trainer.model(x, y)[0].mT, y, ignore_index=-1, reduction="sum")
                for x, y in batches
            ]
        counts = [int((y != -1).sum()) for _, y in batches]
        assert len(set(counts)) > 1
        assert evaluated == pytest.approx(float(sum(sums)) / sum(counts), rel=1e-6)
        trainer.run()
        states.append(trainer.model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-5, atol=1e-6)


def test_an_evaluation_without_masked_targets_is_the_plain_mean(tmp_path: Path) -> None:
    data_set(tmp_path)
    trainer = Trainer(small_config(tmp_path, eval_iters=7), quiet())
    trainer.model.eval()
    with torch.no_grad():
        losses = [trainer.model(x, y)[1] for x, y in trainer.batches.evaluation("val", 7)]
    assert trainer.evaluate()["val"] == (torch.stack(losses).sum() / 7).item()


def test_a_dialogue_does_not_see_the_others_of_its_row(tmp_path: Path) -> None:
    dialogues(tmp_path)
    model = Trainer(chat_config(tmp_path, block_size=160), quiet()).model.eval()
    first, second = (template.encode(CHAT, DATA.train[i])[0].astype(np.int64) for i in (0, 1))
    windows = DialogueWindows(first.astype(np.uint16), 161, BEGIN, np.empty(0, np.uint16))

    def loss(tokens: np.ndarray, start: int, length: int) -> torch.Tensor:
        """Loss of each target of the dialogue that begins at ``start``."""
        x, y = torch.tensor(tokens[None, :-1]), torch.tensor(windows.targets(tokens[None]))
        with torch.no_grad():
            each = F.cross_entropy(model(x, y)[0].mT, y, ignore_index=-1, reduction="none")
        mine = slice(start, start + length - 1)
        return each[0, mine][y[0, mine] != -1]

    alone = loss(first, 0, len(first))
    row = np.concatenate([second, first, second])
    assert len(alone) > 3
    torch.testing.assert_close(loss(row, len(second), len(first)), alone, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def base_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pretrained model in ``out`` and dialogues for it in ``chat``."""
    root = tmp_path_factory.mktemp("base")
    text = words(lines=2000).base
    base = saved_tokenizer(data_set(root, text))
    assert base is not None and base.fingerprint == CHAT.base.fingerprint
    trained(root, max_iters=3, block_size=64, always_save_checkpoint=True)
    dialogues(root)
    return root


def test_a_base_model_gets_the_tokens_of_dialogues(base_run: Path) -> None:
    base = Trainer(small_config(base_run, init_from="resume"), quiet()).model.state_dict()
    out = {"init_from": str(base_run / "out"), "out_dir": str(base_run / "tuned")}
    trainer = Trainer(chat_config(base_run, **out, max_iters=0, learning_rate=0, min_lr=0), quiet())
    state, known = trainer.model.state_dict(), CHAT.base.vocab_size
    for name, value in base.items():
        if name.endswith("wpe.weight"):
            value = value[:40]
        assert torch.equal(state[name][: len(value)], value), name
    table = state["lm_head.weight"]
    assert table is not base["lm_head.weight"] and len(table) == CHAT.padded_vocab_size
    mean = base["lm_head.weight"].mean(dim=0)
    assert ((table[known:] - mean).abs() < 0.12).all() and len(table[known:].unique(dim=0)) > 5
    trainer.run()  # saves the model
    # A model that already has the chat tokens keeps their learned embeddings.
    again = {"init_from": str(base_run / "tuned"), "out_dir": str(base_run / "again")}
    other = Trainer(chat_config(base_run, **again), quiet())
    assert torch.equal(other.model.state_dict()["lm_head.weight"], table)


def test_a_base_model_of_other_tokens_is_refused(base_run: Path, tmp_path: Path) -> None:
    other = ChatTokenizer(CharTokenizer.from_texts([words(lines=2000).base + "#"]))
    dialogues(tmp_path, other)
    with pytest.raises(ValueError, match="has a vocabulary of .* but the data set .*chat has"):
        Trainer(chat_config(tmp_path, init_from=str(base_run / "out")), quiet())
    with pytest.raises(FileNotFoundError, match="has none of the files"):
        Trainer(chat_config(tmp_path, init_from=str(tmp_path)), quiet())
