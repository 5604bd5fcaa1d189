"""A tokenizer.json by tiktoken: the ids of tokenizers, and which files and texts are left to it."""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgpt.byte_level_bpe import ByteLevelBPE
from fastgpt.tokenizer import END_OF_TEXT, JsonTokenizer

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra [data]")
pytest.importorskip("tiktoken", reason="needs the extra [data]")

TEXT = Path(__file__).read_text() + "\n the cat's naïve café \t\r\n  \n42 ... 文 Ωmega 🙂" * 9


def trained(texts: list[str], vocab_size: int) -> Any:
    levels = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = levels(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=levels.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def faster(tokenizer: Any) -> ByteLevelBPE | None:
    return ByteLevelBPE.of(tokenizer.to_str().encode(), tokenizer.model)


@pytest.mark.parametrize("alphabet", ["a", "ab", "abc", "ab ", "abcd\n", "é a'1"])
def test_random_vocabularies(alphabet: str) -> None:
    """Of few letters, so that most neighbours make a token and many merges overlap."""
    draw = random.Random(len(alphabet))

    def text(longest: int) -> str:
        return "".join(draw.choices(alphabet, k=draw.randint(1, longest)))

    for _ in range(12):
        tokenizer = trained([text(60) for _ in range(draw.randint(3, 30))], draw.randint(260, 330))
        ours = faster(tokenizer)
        assert ours is not None
        for part in [text(120) for _ in range(60)] + [alphabet * 300]:
            assert ours.encode(part).tolist() == tokenizer.encode(part).ids


def test_every_character_of_which_it_is_sure() -> None:
    tokenizer = trained([TEXT], 500)
    ours = faster(tokenizer)
    assert ours is not None
    characters = [
        chr(code) for code in (*range(0x3500), *range(0xA000, 0xD800), *range(0x1F000, 0x1FB00))
    ]
    known = [character for character in characters if ours.knows(character)]
    assert 0.6 < len(known) / len(characters) < 0.99
    assert (
        ours.knows("🙂文Ω\u00a0\u2003") and not ours.knows("a\u0378") and not ours.knows("\ud800")
    )
    assert not ours.knows("\u1c80")  # a letter of Unicode 9
    for start in range(0, len(known), 500):
        text = "".join(f"a{c}b1{c}2 {c}{c}\n{c} '{c}" for c in known[start : start + 500])
        assert ours.encode(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_spaces() -> None:
    tokenizer = trained([TEXT], 500)
    ours = faster(tokenizer)
    assert ours is not None
    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choices(" \n\t\r\u00a0\u3000x1.'", k=draw.randint(1, 9)))
        assert ours.encode(text).tolist() == tokenizer.encode(text).ids, repr(text)


def test_the_names_of_special_tokens_are_text() -> None:
    tokenizer = trained([TEXT], 400)
    ours = faster(tokenizer)
    assert ours is not None
    text = f"a{END_OF_TEXT}b"
    assert ours.encode(text).tolist() == tokenizer.encode(text).ids
    assert len(ours.encode(text)) > 3


def _with(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda form: form["model"].update(changes)


def _cut(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda form: form["pre_tokenizer"].update(changes)


def _name(form: dict[str, Any]) -> None:
    form["added_tokens"].append({**form["added_tokens"][0], "id": 400, "content": "cat"})
    form["added_tokens"][-1]["special"] = False


def _without_a_byte(form: dict[str, Any]) -> None:
    del form["model"]["vocab"]["!"]


def _in_another_order(form: dict[str, Any]) -> None:
    merges = form["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def _too_early(form: dict[str, Any]) -> None:
    form["model"]["merges"].sort(key=lambda pair: -len("".join(pair)))


def _out_of_reach(form: dict[str, Any]) -> None:
    """ "abc" of "ab" and "c" that are merged after "bc": no text gives it."""
    vocabulary, merges = form["model"]["vocab"], form["model"]["merges"]
    for pair in (["q", "j"], ["~", "q"], ["~q", "j"]):
        vocabulary["".join(pair)] = max(vocabulary.values()) + 1
        merges.append(pair)


@pytest.mark.parametrize(
    "change",
    [
        _with(dropout=0.1),
        _with(continuing_subword_prefix="##"),
        _with(end_of_word_suffix="</w>"),
        _with(ignore_merges=True),
        _cut(add_prefix_space=True),
        _cut(use_regex=False),
        lambda form: form.update(pre_tokenizer=None),
        lambda form: form.update(normalizer={"type": "NFC"}),
        _name,
        _without_a_byte,
        _in_another_order,
        _too_early,
        _out_of_reach,
    ],
)
def test_files_that_are_left_to_tokenizers(change: Any) -> None:
    form = json.loads(trained([TEXT], 400).to_str())
    form["model"]["merges"] = [list(pair) for pair in form["model"]["merges"]]
    model = tokenizers.Tokenizer.from_str(json.dumps(form)).model
    assert ByteLevelBPE.of(json.dumps(form).encode(), model) is not None
    change(form)
    if not form["model"]["continuing_subword_prefix"]:  # which no merge here has
        model = tokenizers.Tokenizer.from_str(json.dumps(form)).model
    assert ByteLevelBPE.of(json.dumps(form).encode(), model) is None


def test_such_a_file_gives_its_own_ids(tmp_path: Path) -> None:
    form = json.loads(trained([TEXT], 400).to_str())
    form["normalizer"] = {"type": "Lowercase"}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(form))
    ids = tokenizers.Tokenizer.from_file(str(path)).encode(TEXT.lower()).ids
    assert JsonTokenizer(path).encode_array(TEXT).tolist() == ids


def test_other_models_are_left_to_tokenizers() -> None:
    model = tokenizers.models.WordLevel({"a": 0}, unk_token="a")
    assert faster(tokenizers.Tokenizer(model)) is None


@pytest.mark.parametrize("missing", [False, True], ids=["with tiktoken", "without"])
def test_data_is_encoded_by_it(
    missing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    encode = ByteLevelBPE.encode

    def counted(self: Any, text: str) -> Any:
        calls.append(text)
        return encode(self, text)

    monkeypatch.setattr(ByteLevelBPE, "encode", counted)
    if missing:
        monkeypatch.setitem(sys.modules, "tiktoken", None)
    expected = trained([TEXT], 400)
    path = tmp_path / "tokenizer.json"
    expected.save(str(path))
    tokenizer = JsonTokenizer(path)
    for text in (TEXT, TEXT + "\u1c80", ""):
        ids = tokenizer.encode_array(text)
        assert ids.dtype == np.uint32 and ids.tolist() == expected.encode(text).ids
    assert calls == ([] if missing else [TEXT, ""])
    with pytest.raises(TypeError, match="text must be a str"):
        tokenizer.encode_array(b"a")  # type: ignore[arg-type]
