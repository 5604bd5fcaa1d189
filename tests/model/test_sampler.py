"""``Sampler``: text from checkpoints and exported weights."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt import sampler as sampling
from fastgpt.data.sources import TextSource
from fastgpt.interop.export import ExportConfig, export
from fastgpt.interop.huggingface import Weights, write
from fastgpt.sampler import Sampler
from fastgpt.tokenizer import CharTokenizer, Tokenizer
from fastgpt.tokenizer.subword import JsonTokenizer, SentencePieceTokenizer, byte_of_character
from fastgpt.tokenizer.training import train_tokenizer
from fastgpt.training.config import SampleConfig
from fastgpt.training.trainer import Trainer
from tests.tools.small_runs import data_set, small_config


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has almost memorised its text."""
    root = tmp_path_factory.mktemp("run")
    data_set(root)
    trainer = Trainer(small_config(root, max_iters=200, lr_decay_iters=200, n_embd=32, dropout=0.0))
    trainer.run()
    return trainer.out_dir


def sampler(out_dir: Path, **changes: Any) -> Sampler:
    keys = {"num_samples": 3, "max_new_tokens": 20, "device": "cpu", **changes}
    return Sampler(SampleConfig(out_dir=str(out_dir), **keys))


def test_samples_begin_with_the_prompt_and_follow_the_seed(out_dir: Path) -> None:
    texts = list(sampler(out_dir, start="12 times "))
    assert len(texts) == 3
    assert all(text.startswith("12 times ") and len(text) == 29 for text in texts)
    assert len(set(texts)) > 1
    assert texts == list(sampler(out_dir, start="12 times "))
    assert texts != list(sampler(out_dir, start="12 times ", seed=5))


@pytest.mark.parametrize(
    "changes", [{"top_p": 0.0}, {"min_p": 1.0}, {"top_k": 1}], ids=lambda c: next(iter(c))
)
def test_greedy_and_every_cut(out_dir: Path, changes: dict[str, Any]) -> None:
    greedy = list(sampler(out_dir, start="12 t", temperature=0.0, max_new_tokens=5))
    assert greedy == ["12 times "] * 3
    keys: dict[str, Any] = dict(start="12 t", temperature=5.0, max_new_tokens=5, seed=9)
    assert list(sampler(out_dir, **keys)) != greedy
    assert list(sampler(out_dir, **keys, **changes)) == greedy


def test_prompt_from_a_file(out_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("7 times")
    endless = sampler(out_dir, start=f"FILE:{path}", num_samples=2**48)  # more than memory holds
    assert next(iter(endless)).startswith("7 times")
    path.write_text("")
    with pytest.raises(ValueError, match="prompt.txt is empty"):
        sampler(out_dir, start=f"FILE:{path}")
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="prompt.txt is not UTF-8 text"):
        sampler(out_dir, start=f"FILE:{path}")
    with pytest.raises(FileNotFoundError, match="there is no file .*absent.txt"):
        sampler(out_dir, start=f"FILE:{tmp_path / 'absent.txt'}")


def test_what_is_wrong_with_a_prompt_or_a_run_is_named(out_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'é' at position 1, which is not among the"):
        sampler(out_dir, start="1é")
    with pytest.raises(ValueError, match="'é' at position 0"):
        sampler(out_dir).stream("é")  # fails before the first piece
    with pytest.raises(ValueError, match="a prompt must hold at least one token, got ''"):
        sampler(out_dir).complete(["1", ""])
    with pytest.raises(FileNotFoundError, match="no checkpoint .*ckpt.pt"):
        sampler(tmp_path)
    with pytest.raises(ValueError, match="device must be one that this machine has"):
        sampler(out_dir, device="cuda:99")


def test_the_characters_come_with_the_checkpoint(out_dir: Path, tmp_path: Path) -> None:
    """The data set may be gone or prepared anew from another text."""
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "ckpt.pt"
    path.write_bytes((out_dir / "ckpt.pt").read_bytes())
    expected = list(sampler(out_dir))
    assert list(sampler(tmp_path / "out")) == expected
    saved = torch.load(path)
    saved["fastgpt"]["characters"] = saved["fastgpt"]["characters"][:-1]
    torch.save(saved, path)
    with pytest.raises(ValueError, match="has a vocabulary of .* tokens, but its data set has"):
        sampler(tmp_path / "out")


@pytest.mark.parametrize("name", ["gpt2-xl", "openai-community/gpt2-xl", "distilgpt2"])
def test_pretrained_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vocabulary is padded beyond the tokenizer's, like GPT-2's when trained from scratch."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 64, 1, 1, 8))
    tokenizer = CharTokenizer(dict(enumerate("\nabc")))
    asked = []

    def pretrained(name: str) -> GPT:
        asked.append(name)
        return model

    monkeypatch.setattr(GPT, "from_pretrained", pretrained)
    monkeypatch.setattr(sampling, "GPT2Tokenizer", lambda: tokenizer)
    config = SampleConfig(init_from=name, device="cpu", num_samples=1, max_new_tokens=400)
    (text,) = Sampler(config)
    assert asked == [name]
    assert text[0] == "\n" and 5 < len(text) < 200 and set(text) <= set("\nabc")


@pytest.fixture
def hf_folder(out_dir: Path, tmp_path: Path) -> Path:
    """The run exported with `fastgpt export --to=hf`: weights and tokenizer.json."""
    for name in ("safetensors", "tokenizers"):
        pytest.importorskip(name, reason="needs the extra hf")
    keys = ExportConfig(to="hf", out_dir=str(out_dir), output=tmp_path / "weights")
    return export(keys).path


def written(init_from: Path | str, **changes: Any) -> list[str]:
    keys = {"num_samples": 2, "max_new_tokens": 20, "start": "7 ti", "device": "cpu", **changes}
    return list(Sampler(SampleConfig(init_from=str(init_from), **keys)))


def test_weights_by_their_path(out_dir: Path, hf_folder: Path) -> None:
    """A folder, a file in it, and an exported file next to the tokenizer."""
    expected = list(sampler(out_dir, start="7 ti", num_samples=2))
    assert written(hf_folder) == written(hf_folder / "model.safetensors") == expected
    keys = ExportConfig(
        to="safetensors", out_dir=str(out_dir), output=hf_folder / "own.safetensors"
    )
    assert written(export(keys).path) == expected


def test_weights_with_gpt2s_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights without a tokenizer next to them get GPT-2's if the vocabulary is large enough."""
    pytest.importorskip("safetensors", reason="needs the extra hf")
    model = GPT(GPTConfig(8, 50304, 1, 1, 2, bias=True))
    weights = Weights(model.config, model.gelu_approximate, model.state_dict())
    write(weights, tmp_path)
    tokenizer = CharTokenizer(dict(enumerate("\n7 ti")))
    monkeypatch.setattr(sampling, "GPT2Tokenizer", lambda: tokenizer)
    assert all(text.startswith("7 ti") for text in written(tmp_path))

    pytest.importorskip("tiktoken", reason="needs the extra bpe")
    ids = {character: place for place, character in enumerate(byte_of_character())}
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    config = SampleConfig(init_from=str(tmp_path), device="cpu")
    assert Sampler(config).tokenizer.vocab_size == 257  # bytes and end of text


def test_weights_that_cannot_write(hf_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder or file .*absent"):
        written(tmp_path / "absent")
    tokenizer = hf_folder / "tokenizer.json"
    tokenizer.rename(tmp_path / "tokenizer.json")
    message = "vocabulary of .* tokens, but its folder has no tokenizer: none of"
    with pytest.raises(ValueError, match=message):
        written(hf_folder)
    for characters in ("7 ti", "".join(map(chr, range(100, 300)))):
        CharTokenizer(dict(enumerate(characters))).save(hf_folder / "meta.pkl")
        message = rf"tokens, but the tokenizer beside it \(meta.pkl\) has {len(characters)}"
        with pytest.raises(ValueError, match=message):
            written(hf_folder)


# -- stop texts, pieces, batches


def test_the_default_draws_are_those_of_generate(out_dir: Path) -> None:
    """All samples are drawn from one seed, one after another."""
    made = sampler(out_dir, start="12 t", num_samples=2)
    ids = torch.tensor([made.tokenizer.encode("12 t")])
    torch.manual_seed(1337)
    rows = [made.model.generate(ids, 20, 0.8, 200)[0].tolist() for _ in range(2)]
    assert list(made) == [made.tokenizer.decode(row) for row in rows]


@pytest.mark.parametrize("stop", [(";",), (" is", ";"), ("never there",), ("mes 291",), ("é",)])
def test_pieces_add_up_to_the_completion(out_dir: Path, stop: tuple[str, ...]) -> None:
    made = sampler(out_dir, start="12 ti", stop=stop, max_new_tokens=40)
    for seed in range(3):
        torch.manual_seed(seed)
        pieces = list(made.stream("12 ti"))
        torch.manual_seed(seed)
        (completion,) = made.complete(["12 ti"])
        assert "".join(pieces) == completion.text and all(pieces)
        assert not any(text in completion.text for text in stop)
        stopped = completion.finish == "stop"
        assert stopped == (completion.tokens < 40 or len(completion.text) < 40)


def test_a_stop_text_ends_only_its_own_row(out_dir: Path) -> None:
    made = sampler(out_dir, temperature=0.0, stop=(";",), max_new_tokens=30)
    prompts = ["12 times 13 is 15", "7 t"]
    together = made.complete(prompts)
    assert together == [made.complete([prompt])[0] for prompt in prompts]
    assert together[0].tokens != together[1].tokens
    assert [c.finish for c in together] == ["stop", "stop"]


def test_batches_and_lines(out_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("12 t\n\n7 times 8\n")
    made = sampler(out_dir, start=f"FILE:{path}", lines=True, batch_size=4)
    assert [len(batch) for batch in made.batches()] == [4, 2]
    texts = list(made)
    assert [text[:4] for text in texts] == ["12 t"] * 3 + ["7 ti"] * 3
    assert [len(text) for text in texts] == [24] * 3 + [29] * 3 and len(set(texts)) > 4
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="must hold at least one non-empty line"):
        sampler(out_dir, start=f"FILE:{path}", lines=True)


def test_the_penalty_reaches_the_draw(out_dir: Path) -> None:
    made: Any = {"start": "1", "num_samples": 1, "max_new_tokens": 16, "temperature": 0.0}
    (plain,) = sampler(out_dir, **made)
    (text,) = sampler(out_dir, **made, repetition_penalty=99.0)
    assert len(set(text)) > len(set(plain))


def test_dtype_and_compile(out_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a half-precision dtype the matrices are stored in that dtype."""
    compiled = []
    monkeypatch.setattr(GPT, "compile", lambda self: compiled.append(self))
    made = sampler(out_dir, dtype="bfloat16", compile=True)
    assert compiled == [made.model]
    dtypes = {name: p.dtype for name, p in made.model.named_parameters()}
    assert dtypes["transformer.h.0.attn.c_attn.weight"] == torch.bfloat16
    assert dtypes["lm_head.weight"] == torch.bfloat16
    assert dtypes["transformer.wte.weight"] == dtypes["transformer.ln_f.weight"] == torch.float32
    pieces = made.stream("12 t")
    next(pieces)
    assert not torch.is_autocast_enabled("cpu")  # not while the caller runs
    assert len(next(iter(made))) == 21


class Bytes:
    """A tokenizer of UTF-8 bytes; characters may take several tokens."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def grown(text: str, stop: tuple[str, ...]) -> tuple[list[str], Any]:
    row = sampling._Row(Bytes(), list(b"go: "), "go: ", stop)  # type: ignore[arg-type]
    shown = []
    for byte in text.encode():
        row.add(byte)
        shown.append(row.final_text())
    return shown, row.completion()


def test_incomplete_characters_and_stop_texts_are_held_back() -> None:
    shown, completion = grown("aé€b", ())
    assert shown == ["a", "a", "aé", "aé", "aé", "aé€", "aé€b"]
    assert completion.text == "aé€b" and completion.tokens == 7

    shown, completion = grown("x..y...z", ("...",))
    assert shown == ["x", "x", "x", "x..y", "x..y", "x..y", "x..y", "x..y"]
    assert completion == sampling.Completion("go: ", "x..y", 7, "stop")

    shown, completion = grown("abc", ("abd", "bcd"))
    assert shown == ["", "", "a"] and completion.text == "abc" and completion.finish == "length"

    row = sampling._Row(Bytes(), [1], "", ())  # type: ignore[arg-type]
    row.add(256)  # a padding id of the vocabulary
    assert row.completion() == sampling.Completion("", "", 1, "length")

    for ending, finish in ((b"", "length"), (b"!", "stop")):
        row = sampling._Row(Bytes(), [1], "", (), ends=b"!")  # type: ignore[arg-type]
        for byte in b"a\xe2" + ending:
            row.add(byte)
        assert row.completion() == sampling.Completion("", "a\ufffd", 2 + len(ending), finish)


WORDS = "".join(f"Größe {n}:  {n} × {n + 1} €\n\tund 😀 {n * 7} ; " for n in range(300))


def byte_level(root: Path) -> Tokenizer:
    pytest.importorskip("tokenizers", reason="needs the extra data")
    return train_tokenizer(TextSource(WORDS), "bpe", 400, root)


def dropping_the_first_space(root: Path) -> Tokenizer:
    """A byte-level tokenizer with a decoder like that of Llama's tokenizer.json."""
    decoders = pytest.importorskip("tokenizers", reason="needs the extra data").decoders
    steps = [decoders.Replace("Ġ", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer = byte_level(root)
    assert isinstance(tokenizer, JsonTokenizer)
    tokenizer._prompts.decoder = decoders.Sequence(steps)
    return tokenizer


def sentencepiece(root: Path) -> Tokenizer:
    """A tokenizer that prepends a space to each text and has byte pieces for unknown characters."""
    library = pytest.importorskip("sentencepiece", reason="needs the extra data")
    root.mkdir(exist_ok=True)
    with open(root / "tokenizer.model", "wb") as file:
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(WORDS.splitlines()),
            model_writer=file,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            character_coverage=0.98,
            minloglevel=2,
        )
    return SentencePieceTokenizer(root / "tokenizer.model")


@pytest.mark.parametrize("made", [byte_level, dropping_the_first_space, sentencepiece])
def test_text_in_pieces_is_the_text_of_all_tokens(
    made: Callable[[Path], Tokenizer], tmp_path: Path
) -> None:
    """Spaces and split characters match decoding all ids at once, for a text's ids and random ones;
    no id is decoded more than a few times."""
    tokenizer = made(tmp_path)
    decode, decoded = tokenizer.decode, 0

    def counted(ids: Any) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids)

    prompt = tokenizer.encode("Gr")
    text_ids = tokenizer.encode(WORDS)[:300]
    any_ids = torch.randint(tokenizer.vocab_size, (300,)).tolist()
    # Some decoders give a single space token no text.
    blank = [i for i in range(tokenizer.vocab_size) if not decode([i])] or any_ids
    spaced = [i for pair in zip(text_ids, itertools.cycle(blank), strict=False) for i in pair]
    for ids in (text_ids, any_ids, spaced):
        decoded, tokenizer.decode = 0, counted  # type: ignore[method-assign]
        row = sampling._Row(tokenizer, prompt, "Gr", ())
        for end, token in enumerate(ids, start=1):
            row.add(token)
            expected = decode(prompt + ids[:end])[len(decode(prompt)) :]
            assert expected.startswith(row.final_text())
        assert row.completion().text == expected
        assert decoded < 10 * len(ids)


def test_a_vocabulary_without_a_line_feed(tmp_path: Path) -> None:
    """The default start is then token 0, in `fastgpt sample` and in the sample after training."""
    data_set(tmp_path, "a text in a single line, " * 60)
    Trainer(small_config(tmp_path)).run()
    made = sampler(tmp_path / "out")
    assert sampling.start_ids(made.tokenizer) == [0] and made.prompts == [" "]
    for text in made:
        assert len(text) == 21 and text[0] == " "
    with pytest.raises(ValueError, match=r"text has '\\n' at position 1"):
        sampler(tmp_path / "out", start="a\n")
