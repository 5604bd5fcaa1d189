"""README.md and docs/ are valid: commands and their options, names, paths, links, Python code."""

import argparse
import importlib
import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bench import publish
from fastgpt.cli import main as cli
from fastgpt.cli.train import Train
from fastgpt.training.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAM = re.compile(r"(\w+=\S+ )*(fastgpt|python|pytest|torchrun|pip|ruff|mypy|\.ci/run)( |$)")
PLACEHOLDERS = {"FILE": "./file", "FOLDER": "./folder", "DIR": "./dir"}
GENERATED = ("bench/results/", "build/", "out/")  # made by a command


def _code(page: Path) -> str:
    """Code blocks and spans of the page, one per line."""
    text = page.read_text()
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    blocks = [block for language, block in fences if language in ("", "sh")]
    indented = re.findall(r"^    (.*)$", text, re.M)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", rest)]
    return "\n".join([*blocks, *indented, *spans]).replace("\\\n", " ")


def _commands() -> Iterator[tuple[str, str]]:
    """(page, command), each command once."""
    for page in PAGES:
        found: dict[str, None] = {}
        for line in _code(page).splitlines():
            for command in re.sub(r"\s+# .*", "", line).split(" && "):
                if PROGRAM.match(command):
                    found[command.strip()] = None
        yield from ((page.name, command) for command in found)


COMMANDS = list(_commands())


class _Parsed(BaseException):
    """Raised once the arguments are parsed, so that nothing runs."""


def _stopping(parse: Callable[..., object]) -> Callable[..., object]:
    def parse_and_stop(*args: object, **kwargs: object) -> object:
        parse(*args, **kwargs)
        raise _Parsed

    return parse_and_stop


def _fastgpt(words: list[str]) -> None:
    if "--help" in words:
        return
    command = cli._parse(words, Train())
    if isinstance(command, Train):
        TrainConfig(**command.keys())


def _torchrun(words: list[str]) -> None:
    run = importlib.import_module("torch.distributed.run")
    given = run.get_args_parser().parse_args(words)
    assert given.training_script == "fastgpt" and given.module
    _fastgpt(given.training_script_args)


def _pip(words: list[str]) -> None:
    extras = re.findall(r"\[(\w+)\]", " ".join(words))
    declared = (ROOT / "pyproject.toml").read_text()
    assert words[0] == "install" and all(re.search(rf"^{x} = \[", declared, re.M) for x in extras)


def _python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]) or words[1] == "coverage", words[1]
        paths = [word for word in words[2:] if "/" in word and not word.startswith("-")]
        assert all(list(ROOT.glob(path)) for path in paths), paths
    elif words[0] == "setup.py":
        done = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr
    elif words[0].startswith("bench/"):
        module = importlib.import_module(words[0].removesuffix(".py").replace("/", "."))
        if not words[1:]:
            assert callable(module.main)
            return
        parser = argparse.ArgumentParser
        monkeypatch.setattr(parser, "parse_args", _stopping(parser.parse_args))
        with pytest.raises(_Parsed):
            module.main(words[1:])
    else:
        assert words == ["program.py"]  # the reader's own program


def _pytest(words: list[str], config: pytest.Config) -> None:
    given, unknown = config._parser.parse_known_and_unknown_args(words)
    assert not unknown
    for path in given.file_or_dir:
        assert (ROOT / path.partition("::")[0]).exists(), path


@pytest.mark.parametrize("page, command", COMMANDS, ids=[" ".join(c) for c in COMMANDS])
def test_a_command(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    while re.fullmatch(r"\w+=.*", words[0]):
        del words[0]
    program, *words = [PLACEHOLDERS.get(w, w) for w in words]
    words = [re.sub(r"=(FILE|FOLDER|DIR)$", lambda m: f"={PLACEHOLDERS[m[1]]}", w) for w in words]
    if program == "fastgpt":
        _fastgpt(words)
    elif program == "torchrun":
        _torchrun(words)
    elif program == "pip":
        _pip(words)
    elif program == "python":
        _python(words, monkeypatch)
    elif program == "pytest":
        _pytest(words, request.config)
    elif program == ".ci/run":
        assert os.access(ROOT / program, os.X_OK)


def test_the_commands_are_found() -> None:
    shown = {command for _, command in COMMANDS}
    assert {"fastgpt doctor", "pytest", "python bench/run.py", 'pip install -e ".[test]"'} <= shown
    with pytest.raises(ValueError, match="unknown option --no_such_key"):
        _fastgpt(["train", "--no_such_key=1"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_paths_and_links(page: Path) -> None:
    text, code = page.read_text(), _code(page)
    for name in re.findall(r"^(fastgpt(?:\.\w+)+)$", code, re.M):
        pkgutil.resolve_name(name)
    for path in re.findall(r"^((?:[\w.]+/)+(?:\w+\.\w+)?)$", code, re.M):
        assert path.startswith(GENERATED) or (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#]+)\)", re.sub(r"`[^`]*`", "", text)):
        assert (page.parent / link).exists(), link


def test_the_gate_names_tests_that_exist() -> None:
    words = re.findall(r"tests/\S+", (ROOT / ".ci" / "run").read_text())
    expand = ["bash", "-c", "printf '%s\\n' " + " ".join(words)]
    paths = subprocess.run(expand, capture_output=True, text=True, check=True).stdout.split()
    assert len(paths) > 10 and all((ROOT / path).exists() for path in paths), paths


def test_python() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert blocks
    for block in blocks:
        scope: dict[str, object] = {}
        exec(block, scope)
        loss = scope["loss"]
        assert isinstance(loss, torch.Tensor) and loss.isfinite()


def test_lengths() -> None:
    """The README stays short, not counting the tables that measurements add, and so does each
    page."""
    before, _, rest = PAGES[0].read_text().partition(publish.BEGIN)
    assert len((before + rest.partition(publish.END)[2]).splitlines()) <= 90
    assert all(len(page.read_text().splitlines()) <= 150 for page in PAGES[1:])
