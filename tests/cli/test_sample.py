"""``fastgpt sample``: output, interactive prompts, JSON."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastgpt.cli import main as cli
from fastgpt.cli.sample import _lines
from fastgpt.sampler import Sampler, read_prompts
from fastgpt.training.config import SampleConfig
from fastgpt.training.trainer import Trainer
from tests.tools.small_runs import data_set, small_config


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    data_set(root)
    Trainer(small_config(root)).run()
    return root / "out"


@pytest.fixture
def sample(out_dir: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*argv: str) -> tuple[str, str]:
        capsys.readouterr()
        common = [f"--out_dir={out_dir}", "--device=cpu", "--max_new_tokens=12"]
        assert cli.main(["sample", *common, *argv]) == 0
        return capsys.readouterr()

    return run


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_texts_and_rules(sample: Any, out_dir: Path, batch_size: int) -> None:
    out, err = sample("--start=12 t", "--num_samples=3", f"--batch_size={batch_size}")
    config = SampleConfig(
        out_dir=str(out_dir),
        device="cpu",
        max_new_tokens=12,
        start="12 t",
        num_samples=3,
        batch_size=batch_size,
    )
    rule = "─" * 80
    assert out == "".join(f"{text}\n{rule}\n" for text in Sampler(config)) and err == ""


def test_text_is_shown_as_it_grows(sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def pieces(self: Sampler, prompt: str) -> Iterator[str]:
        for piece in "abc":
            events.append(f"made {piece}")
            yield piece

    events: list[str] = []
    out = cli.Console.out

    def noted(self: Any, *objects: Any, **options: Any) -> None:
        events.append(f"shown {objects[0]}")
        out(self, *objects, **options)

    monkeypatch.setattr(Sampler, "stream", pieces)
    monkeypatch.setattr(cli.Console, "out", noted)
    sample("--start=1", "--num_samples=1")
    steps = [event for piece in "abc" for event in (f"made {piece}", f"shown {piece}")]
    assert events == ["shown 1", *steps, "shown "]


def test_json(sample: Any) -> None:
    options = ["--start=12 t", "--num_samples=3", "--json", "--temperature=0", "--stop=;"]
    out, _ = sample(*options, "--stop", "never there", "--batch_size=2")
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 3 and rows[0] == rows[1] == rows[2]
    assert list(rows[0]) == ["prompt", "completion", "tokens", "finish"]
    assert rows[0]["prompt"] == "12 t" and ";" not in rows[0]["completion"]
    assert rows[0]["finish"] in ("stop", "length") and 1 <= rows[0]["tokens"] <= 12


def test_lines_of_a_file(sample: Any, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("1\n22 times\n")
    out, _ = sample(f"--start=FILE:{tmp_path / 'p.txt'}", "--lines", "--num_samples=1", "--json")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["1", "22 times"]


_ODD_LINES = "\ufeff1\r\n2\f2 \u2028x\x85\r3\r\n\r\n4\n"


def test_where_lines_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines end at \\n or \\r\\n only, in files and on stdin; a byte order mark is dropped."""
    expected = ["1", "2\f2 \u2028x\x85\r3", "4"]
    path = tmp_path / "p.txt"
    path.write_bytes(_ODD_LINES.encode())
    assert read_prompts(f"FILE:{path}", lines=True) == expected
    assert read_prompts(f"FILE:{path}") == [_ODD_LINES[1:]]
    monkeypatch.setattr("sys.stdin", path.open(encoding="utf-8"))
    assert list(_lines("> ")) == expected


def test_dialogue(sample: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "12 t\n\né\nFILE:absent.txt\n7\n")
    out, err = sample("--interactive")
    assert out.startswith("12 t") and "\n7" in out and ">" not in out
    assert "'é' at position 0" in err and "there is no file absent.txt" in err

    typed(monkeypatch, "12 t\n7")
    out, _ = sample("--interactive", "--json")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["12 t", "7"]


def test_dialogue_on_a_terminal_and_an_interrupted_sample(
    sample: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["12", "7"])
    asked: list[str] = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    def stopped(self: Sampler, prompt: str) -> Iterator[str]:
        yield "ab"
        if prompt == "12":
            raise KeyboardInterrupt
        yield "cd"

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(Sampler, "stream", stopped)
    out, _ = sample("--interactive")
    assert out == "12ab\n7abcd\n" and asked == ["> "] * 3
