"""``fastgpt prepare`` and ``fastgpt tokenizer`` as a user types them, then ``train`` and ``sample``
on the result.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgpt.cli import main as cli
from fastgpt.data import builtin_texts
from fastgpt.data.manifest import read_manifest
from fastgpt.tokenizer import CharTokenizer, tokenizer_from
from fastgpt.training import checkpoint as ckpt
from tests.tools.small_runs import arguments, small_keys

pytest.importorskip("tokenizers", reason="needs the extra [data]")
pytest.importorskip("sentencepiece", reason="needs the extra [data]")

DOCUMENTS = [f"Document {i} says: to be, or not to be, that is number {i}.\n" for i in range(400)]


@pytest.fixture(autouse=True)
def _texts(in_tmp_path: None) -> None:
    lines = [json.dumps({"text": text, "body": text[::-1]}) for text in DOCUMENTS]
    Path("docs.jsonl").write_text("\n".join(lines))
    Path("text.txt").write_text("".join(DOCUMENTS))


def run(*argv: str) -> None:
    assert cli.main(list(argv)) == 0


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_from_texts_to_a_sample(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    run("tokenizer", "train", "--input=docs.jsonl", f"--kind={kind}", "--vocab_size=300",
        "--out_dir=tokenizers/my own")  # fmt: skip
    run("prepare", "--input=docs.jsonl", "--tokenizer=tokenizers/my own", "--val_share=0.2",
        "--shard_tokens=3000", "--workers=2")  # fmt: skip
    out = capfd.readouterr().out
    assert "use it: fastgpt prepare --tokenizer 'tokenizers/my own' --input docs.jsonl" in out
    assert "prepared data/docs: " in out and "train on it: fastgpt train --dataset=docs" in out
    manifest = read_manifest("data/docs")
    assert manifest is not None and len(manifest.splits["train"].shards) > 1
    assert sum(split.documents for split in manifest.splits.values()) == len(DOCUMENTS)
    keys = small_keys(Path(), data_root="data", dataset="docs", max_iters=4, eval_interval=2)
    run("train", "--preset=gpt2", *arguments(keys))
    out = capfd.readouterr().out
    assert "bigram, counted on" in out and "sample" in out
    saved = ckpt.load(Path(keys["out_dir"]) / "ckpt.pt")
    assert saved["model_args"]["vocab_size"] == 320  # 300, padded
    # the run folder has a copy of the tokenizer, so the data may be gone
    Path("data").rename("elsewhere")
    run("sample", f"--out_dir={keys['out_dir']}", "--start=to be", "--num_samples=1",
        "--max_new_tokens=5", "--device=cpu")  # fmt: skip
    assert "to be" in capfd.readouterr().out
    # a different tokenizer is detected
    run("tokenizer", "train", "--input=docs.jsonl", f"--kind={kind}", "--vocab_size=310",
        "--out_dir=tokenizers/other")  # fmt: skip
    run("prepare", "--input=docs.jsonl", "--tokenizer=tokenizers/other", "--val_share=0.2")
    assert cli.main(["train", "--init_from=resume", f"--out_dir={keys['out_dir']}"]) == 2
    assert "was trained on 300 tokens that are not those of the data" in capfd.readouterr().err


def test_the_share_of_one_text() -> None:
    run("prepare", "--input=text.txt")
    run("prepare", "--input=text.txt")  # already finished
    assert sorted(os.listdir("data/text")) == ["manifest.json", "meta.pkl", "train.bin", "val.bin"]
    run("prepare", "--input=text.txt", "--val_share=0.25", "--out_dir=data/quarter")
    total = len("".join(DOCUMENTS))
    manifest = read_manifest("data/quarter")
    assert manifest is not None
    assert manifest.splits["val"].tokens == total - int(0.75 * total)
    whole = [
        b"".join(Path(folder, f"{split}.bin").read_bytes() for split in ("train", "val"))
        for folder in ("data/text", "data/quarter")
    ]
    assert whole[0] == whole[1]


@pytest.mark.parametrize("tokenizer", ["char", "t/tokenizer.json"])
def test_the_corpora(
    tokenizer: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(builtin_texts, "builtin_text", lambda: "".join(DOCUMENTS))
    monkeypatch.setattr(builtin_texts, "shakespeare_text", lambda: "".join(DOCUMENTS[1:]))
    run("tokenizer", "train", "--input=text.txt", "--vocab_size=300", "--out_dir=t")
    for corpus in ([], ["shakespeare"], ["shakespeare", "--out_dir=else/where"]):
        run("prepare", *corpus, f"--tokenizer={tokenizer}")
    assert "fastgpt train --data_root=else --dataset=where" in capfd.readouterr().out
    names = {"char": ["builtin", "shakespeare_char"]}.get(tokenizer, ["builtin_bpe", "shakespeare"])
    for folder, documents in (
        (Path("data", names[0]), DOCUMENTS),
        (Path("data", names[1]), DOCUMENTS[1:]),
        (Path("else", "where"), DOCUMENTS[1:]),
    ):
        ids = [np.fromfile(folder / f"{split}.bin", np.uint16) for split in ("train", "val")]
        assert "".join(map(tokenizer_from(folder).decode, ids)) == "".join(documents)


def test_nothing_is_downloaded_for_a_folder_that_is_a_file_and_nothing_written_without_it(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    def offline() -> str:
        raise ConnectionError("could not download it")

    monkeypatch.setattr(builtin_texts, "shakespeare_text", offline)
    said = refused("prepare", "shakespeare", "--out_dir=text.txt")
    assert "out_dir must be a folder, but text.txt is a file" in said
    assert "could not download it" in refused("prepare", "shakespeare", code=1)
    assert not Path("data").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["prepare", "--input=docs.jsonl", "--hf_dataset=x"], "--input or --hf_dataset, not both"),
        (["prepare", "--input=docs.jsonl", "--hf_split=x"], "--hf_split need --hf_dataset"),
        (["prepare", "--input=docs.jsonl", "--tokenizer=x"], "char, gpt2 or a path, but there is"),
        (["prepare", "--input=nowhere", "--tokenizer=gpt2"], "the input nowhere does not exist"),
        (["prepare", "--input=docs.jsonl", "--text_key=x"], "has no 'x', but 'text', 'body'; name"),
        (["prepare", "--input=docs.jsonl", "--end_of_text=ab"], "must be one token, but 'ab' is 2"),
        (["prepare", "--input=text.txt", "--seed=1"], "seed=1 has no use: one text"),
        (["prepare", "--input=text.txt", "--end_of_text=a"], "text=a has no use: one text"),
        (["tokenizer", "train", "--input=x", "--out_dir=t"], "the input x does not exist"),
    ],
)
def test_errors(argv: list[str], message: str, refused: Callable[..., str]) -> None:
    assert message in refused(*argv)
    assert not Path("t").exists() and not Path("data/docs/manifest.json").exists()


def test_an_interruption_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CharTokenizer, "encode_array", interrupted)
        assert cli.main(["prepare", "--input=docs.jsonl", "--val_share=0.5"]) == 130
    assert "the same command continues from here" in capfd.readouterr().out
    run("prepare", "--input=docs.jsonl", "--val_share=0.5")
