"""``fastgpt translate`` as a user types it: training, resuming, translating, rejected input; and
its data.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.translation import TorchTrainer
from fastgpt.__main__ import main
from fastgpt.tokenizer import CharTokenizer
from fastgpt.training import checkpoint as ckpt
from fastgpt.translation.built_in import TASKS, english, german
from fastgpt.translation.config import TranslationConfig
from fastgpt.translation.pairs import Batches, encoded_pairs, hold_out, read_lines
from fastgpt.translation.trainer import TranslationTrainer
from fastgpt.translation.translator import Translator, scores
from tests.tools.small_runs import (
    arguments,
    assert_same,
    data_set,
    interrupted,
    quiet,
    small_keys,
)

PAIRS = [(f"{a} {b}", f"{b}-{a}") for a in "abcdefgh" for b in "stuvwxyz"]
SMALL: dict[str, object] = dict(n_layer=1, n_head=2, n_embd=16, batch_tokens=64)
SMALL |= dict(max_iters=12, eval_interval=5)
SMALL |= dict(log_interval=2, warmup_iters=4, held_out=6, max_length=16, device="cpu")


@pytest.fixture(autouse=True)
def _texts(in_tmp_path: None) -> None:
    sources, targets = zip(*PAIRS, strict=True)
    Path("a.txt").write_text("\n".join(sources) + "\n")
    Path("b.txt").write_text("\r\n".join(targets))
    Path("both.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in PAIRS))


def trained(out_dir: str, **changes: object) -> TranslationTrainer:
    keys: dict = {**SMALL, "pairs": Path("both.tsv"), "out_dir": Path(out_dir), **changes}
    trainer = TranslationTrainer(TranslationConfig(**keys), quiet())
    trainer.run()
    return trainer


def train(*argv: str, **changes: object) -> int:
    keys = [f"--{key}={value}" for key, value in {**SMALL, **changes}.items()]
    return main(["translate", "train", *argv, *keys])


@pytest.mark.parametrize(
    "tokenizer, shared", [("char", True), ("char", False), ("bpe", True), ("unigram", False)]
)
def test_from_two_files_to_a_translation(
    tokenizer: str, shared: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    if tokenizer != "char":
        pytest.importorskip({"bpe": "tokenizers", "unigram": "sentencepiece"}[tokenizer])
    files = ("--source=a.txt", "--target=b.txt", "--out_dir=out", f"--tokenizer={tokenizer}")
    assert train(*files, "--vocab_size=276", shared=shared) == 0
    out, _ = capfd.readouterr()
    assert "6 pairs held out" in out and "% of what was held out is exact" in out
    assert 'translate with it: fastgpt translate --model out "TEXT"' in out
    assert ckpt.load(Path("out/ckpt.pt"))["iter_num"] in (5, 10, 12)
    rows = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    assert [row["iter"] for row in rows if "val/loss" in row] == [0, 5, 10, 12]
    assert [row["iter"] for row in rows if "loss" in row] == [0, 2, 4, 6, 8, 10]
    held_out = [line.split("\t") for line in Path("out/held_out.tsv").read_text().splitlines()]
    assert len(held_out) == 6 and {tuple(pair) for pair in held_out} <= set(PAIRS)
    texts = [source for source, _ in held_out]
    expected = Translator("out", "cpu")(texts, beam=2)
    Path("texts.txt").write_text("\n".join(texts))
    assert main(["translate", "--model", "out", "--beam=2", *texts]) == 0
    assert capfd.readouterr().out.splitlines() == expected
    assert main(["translate", "--model", "out", "--beam=2", "--source=texts.txt"]) == 0
    assert capfd.readouterr().out.splitlines() == expected


def test_it_learns_to_translate() -> None:
    plain = dict(dropout=0.0, label_smoothing=0.0, warmup_iters=20, learning_rate=1e-2)
    trainer = trained("out", max_iters=200, eval_interval=200, batch_tokens=128, n_embd=32, **plain)
    texts, references = zip(*trainer.held_out, strict=True)
    assert Translator("out", "cpu")(texts) == list(references)


def test_the_losses_are_those_of_pytorchs_transformer_trained_alike() -> None:
    keys: dict = {**SMALL, "pairs": Path("both.tsv"), "dropout": 0.0}
    ours, theirs = (
        kind(TranslationConfig(**keys, out_dir=Path(kind.__name__)), quiet())
        for kind in (TranslationTrainer, TorchTrainer)
    )
    ours.run()
    theirs.run()
    logs = [Path(kind, "log.jsonl") for kind in ("TranslationTrainer", "TorchTrainer")]
    rows = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    assert len(rows[0]) == 10
    for row, other in zip(*rows, strict=True):
        for key in row.keys() & {"loss", "train/loss", "val/loss"}:
            assert row[key] == pytest.approx(other[key], abs=1e-4)


def test_ctrl_c_saves_and_resuming_is_seamless(capfd: pytest.CaptureFixture[str]) -> None:
    whole = trained("whole", dtype="bfloat16")
    with interrupted(TranslationTrainer, 7):
        assert train("--pairs=both.tsv", "--out_dir=out", dtype="bfloat16") == 130
    assert "saved out/last.pt. Resume with the same command and --resume" in capfd.readouterr().out
    resumed = trained("out", dtype="bfloat16", resume=True)
    assert_same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
    states = [ckpt.load(Path(name, "last.pt")) for name in ("whole", "out")]
    assert_same(states[0]["optimizer"], states[1]["optimizer"])
    rows = Path("out/log.jsonl").read_text().splitlines()
    assert [json.loads(row)["iter"] for row in rows] == [0, 0, 2, 4, 5, 6, 8, 10, 10, 12]


def test_a_new_run_keeps_the_files_of_the_one_before() -> None:
    trained("out", max_iters=1)
    before = Path("out/ckpt.pt").read_bytes()
    trained("out", max_iters=1, seed=1)
    assert Path("out/previous-1/ckpt.pt").read_bytes() == before
    assert Path("out/previous-1/held_out.tsv").exists()


def test_scores(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sacrebleu", reason="needs the extra translate")
    same = ["the cat sat on the mat", "one two three four"]
    assert scores(same, same) == {"BLEU": pytest.approx(100), "chrF": 100.0, "exact": 100.0}
    other = scores(["the cat sat on a mat", "five"], same)
    assert 20 < other["BLEU"] < 80 and 20 < other["chrF"] < 80 and other["exact"] == 0.0
    trained("out", max_iters=1)
    assert main(["translate", "--model=out", "--pairs=out/held_out.tsv"]) == 0
    assert "chrF " in capfd.readouterr().out


def test_scores_without_sacrebleu(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    argv = ["translate", "--model=nowhere", "--source=a.txt", "--target=b.txt"]
    assert "BLEU needs sacrebleu: pip install" in refused(*argv)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--source=a.txt"], "give one parallel text: .* got source without target"),
        (["numbers", "--pairs=both.tsv"], "give one parallel text: .* got task, pairs"),
        ([], "give one parallel text: .* got none"),
        (["--source=a.txt", "--target=short.txt"], "a.txt has 64 lines and short.txt has 2: "),
        (["--source=hole.txt", "--target=b.txt"], "hole.txt:2 is empty"),
        (["--source=none.txt", "--target=b.txt"], "No such file or directory: none.txt"),
        (["--source=nothing.txt", "--target=b.txt"], "nothing.txt is empty"),
        (
            ["--source=latin.txt", "--target=b.txt"],
            "the input latin.txt is not UTF-8: byte 0xe9",
        ),
        (["--pairs=three.tsv"], "three.tsv:1 must be a text, a tab and its translation, got"),
        (["--pairs=both.tsv", "--max_length=3"], "source 'a s' has 3 tokens and an end token"),
        (["--pairs=both.tsv", "--held_out=64"], r"held_out must lie in \[1, 63\] .* got 64"),
        (["--pairs=both.tsv", "--tokenizer=nope"], "tokenizer must be char, gpt2 or a path"),
        (["--pairs=both.tsv", "--max_iters=0"], "max_iters must be at least 1, got 0"),
        (["--pairs=one.tsv"], "must have at least two different sources, one to hold out, got 1"),
        (["--source=tab.txt", "--target=short.txt"], "line 2 of .*must not contain a tab"),
        (["--pairs=both.tsv", "--learning_rate=0"], "learning_rate must be positive, got 0.0"),
        (["--pairs=both.tsv", "--n_head=3"], "n_embd must be a multiple of n_head"),
        (["--pairs=both.tsv", "--out_dir=a.txt"], "out_dir must be a folder, but a.txt is a file"),
        (["--pairs=both.tsv", "--resume"], "there is no checkpoint out-translate/last.pt"),
    ],
)
def test_what_training_refuses(argv: list[str], message: str, refused: Callable[..., str]) -> None:
    Path("short.txt").write_text("x\ny\n")
    Path("hole.txt").write_text("x\n\ny\n")
    Path("nothing.txt").write_text("\n")
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    Path("three.tsv").write_text("a\tb\tc\n")
    Path("one.tsv").write_text("a\tb\na\tc\n")
    Path("tab.txt").write_text("x\ny\tz\n")
    assert re.search(message, line := refused("translate", "train", *argv)), line


def test_what_resuming_and_translating_refuse(refused: Callable[..., str]) -> None:
    trained("out", max_iters=1)
    same = [f"--{key}={value}" for key, value in SMALL.items()]
    again = ("translate", "train", "--pairs=both.tsv", "--out_dir=out", "--resume", *same)
    assert "n_layer must be 1 to resume out/last.pt, got 2" in refused(*again, "--n_layer=2")
    Path("both.tsv").write_text("".join(f"{a}\t{a}\n" for a, _ in PAIRS))
    assert "out/last.pt was trained on another parallel text" in refused(*again)

    use = ("translate", "--model", "out")
    assert "there is no model nowhere/ckpt.pt: " in refused("translate", "--model=nowhere", "x")
    assert "which is not among the" in refused(*use, "é")
    assert "must not be empty, got ' '" in refused(*use, " ")
    assert "has 16 tokens and an end token, more than max_length 16" in refused(*use, "a" * 16)
    assert "give texts to translate, or --source" in refused(*use)
    assert "give texts to translate, or --source" in refused(*use, "a", "--source=a.txt")
    assert "beam must lie in [1, " in refused(*use, "--beam=999", "a s")
    Path("out/ckpt.pt").write_bytes(b"nothing")
    assert "out/ckpt.pt is not a checkpoint" in refused(*use, "a s")
    torch.save({"model": {}, "model_args": {}}, "out/ckpt.pt")  # as that of a language model
    assert "out/ckpt.pt is not a translation model: fastgpt translate train writes one" in refused(
        *use, "a s"
    )


def test_a_translation_model_is_no_language_model(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    trained("out", max_iters=1)
    keys = small_keys(data_set(tmp_path).parent, init_from="out", out_dir="other")
    for argv in (
        ["sample", "--out_dir=out"],
        ["train", *arguments(keys)],
        ["train", "--init_from=resume", "--out_dir=out"],
        ["reward", "--init_from=out", "--dataset=none.jsonl"],
    ):
        said = "out/ckpt.pt is a translation model: fastgpt translate --model out uses it"
        assert refused(*argv) == f"error: {said}"


def test_lines_end_with_a_line_feed_alone(tmp_path: Path) -> None:
    """A carriage return within a line, common in text from the web, is an ordinary character."""
    (tmp_path / "texts").write_bytes(b"\xef\xbb\xbfa\rb\r\nc\xc2\x85d\n")
    assert read_lines(tmp_path / "texts") == ["a\rb", "c\x85d"]


def test_fewer_characters_than_hypotheses() -> None:
    Path("ab.tsv").write_text("a\tb\nb\ta\nab\tba\n")
    assert train("--pairs=ab.tsv", "--out_dir=out", max_iters=1, held_out=1) == 0
    assert main(["translate", "--model=out", "ab"]) == 0
    assert Translator("out", "cpu")([]) == []


def test_numbers_in_words() -> None:
    for n, words, word in (
        (0, "zero", "null"),
        (1, "one", "eins"),
        (17, "seventeen", "siebzehn"),
        (21, "twenty-one", "einundzwanzig"),
        (30, "thirty", "dreißig"),
        (101, "one hundred and one", "einhunderteins"),
        (1006, "one thousand and six", "eintausendsechs"),
        (21_011, "twenty-one thousand and eleven", "einundzwanzigtausendelf"),
        (
            42_107,
            "forty-two thousand one hundred and seven",
            "zweiundvierzigtausendeinhundertsieben",
        ),
        (101_001, "one hundred and one thousand and one", "einhunderteintausendeins"),
    ):
        assert (english(n), german(n)) == (words, word)
    every = range(0, 1_000_000, 97)
    assert len({english(n) for n in every}) == len({german(n) for n in every}) == len(every)


@pytest.mark.parametrize("task, size", [("numbers", 20_000), ("reverse", 50_000)])
def test_built_in_texts(task: str, size: int) -> None:
    pairs = TASKS[task](1)
    assert pairs == TASKS[task](1)
    assert len(pairs) == len({source for source, _ in pairs}) == size
    if task == "reverse":
        assert all(source[::-1] == target for source, target in pairs)


def test_what_is_held_out_is_not_trained_on() -> None:
    pairs = [("a", "x"), ("a", "y"), ("b", "z"), ("c", "z")] * 2
    for seed in range(5):
        train_pairs, held_out = hold_out(pairs, 1, seed)
        assert len(train_pairs) + len(held_out) == len(pairs)
        assert len({source for source, _ in held_out}) == 1
        assert not {source for source, _ in held_out} & {source for source, _ in train_pairs}


def test_batches() -> None:
    """An epoch has every pair once; batches respect the token limit; a seed fixes the order."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 12, (50, 2), generator=draw).tolist()
    pairs = [("a" * s, "b" * t) for s, t in lengths]
    tokenizer = CharTokenizer.from_texts("ab")
    ids = encoded_pairs(pairs, (tokenizer, tokenizer), 13)
    batches, again = (Batches(ids, 40, seed=3) for _ in range(2))

    def rows(batch: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[int, ...]]:
        assert max(side.numel() for side in batch) <= 40
        return [
            tuple(int((row >= 0).sum()) - 1 for row in both) for both in zip(*batch, strict=True)
        ]

    n = len(batches)
    epochs = [[batches[i] for i in range(e * n, e * n + n)] for e in range(2)]
    for epoch in (*epochs, list(batches.in_order())):
        assert sorted(row for batch in epoch for row in rows(batch)) == sorted(map(tuple, lengths))
    assert [rows(b) for b in epochs[0]] != [rows(b) for b in epochs[1]]
    assert_same(again[n + 1], batches[n + 1])  # independent of earlier accesses
    assert 0.0 < batches.padding() < 0.5
    assert_same(Batches(ids, 1, seed=3)[0].source.shape[0], 1)  # never an empty batch
