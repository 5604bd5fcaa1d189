"""``fastgpt sample --chat`` and ``--dialogues`` with a model that knows two answers by heart."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from fastgpt.assistant import template
from fastgpt.assistant.chat import Chat, answers
from fastgpt.assistant.dialogues import DialogueSource
from fastgpt.assistant.words import Dialogue, write_dialogues
from fastgpt.cli import main as cli
from fastgpt.data.prepare import prepare
from fastgpt.interop.export import ExportConfig, export
from fastgpt.sampler import Sampler
from fastgpt.tokenizer import CharTokenizer, ChatTokenizer, JsonTokenizer, packed
from fastgpt.training.config import SampleConfig
from tests.tools.small_assistants import folder_of, small_gpt
from tests.tools.small_runs import data_set, trained

SYSTEM = {"role": "system", "content": "go"}
PING = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
MORE = [{"role": "user", "content": "more"}, {"role": "assistant", "content": "no, me"}]
BLOCK_SIZE = 32  # a turn has 12 or 14 tokens


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    shapes: list[Dialogue] = [PING, MORE, PING + MORE, MORE + PING, PING + PING]
    shapes += [[SYSTEM, *shape] for shape in shapes]
    write_dialogues(shapes * 8, root / "d.jsonl")
    tokenizer = ChatTokenizer(CharTokenizer.from_texts("gimnopre, "))
    prepare(DialogueSource(root / "d.jsonl"), tokenizer, root / "chat", val_share=0.2)
    keys = {"dataset": "chat", "block_size": BLOCK_SIZE, "n_embd": 32, "n_layer": 1, "dropout": 0.0}
    keys |= {"max_iters": 120, "lr_decay_iters": 120, "eval_interval": 60}
    keys |= {"gradient_accumulation_steps": 1, "batch_size": 8}
    trainer = trained(root, **keys)
    assert trainer.val_loss < 0.02
    return root


def chat_of(root: Path, system: str = "", **changes: Any) -> Chat:
    keys = {"out_dir": str(root / "out"), "device": "cpu", "temperature": 0.0, **changes}
    return Chat(Sampler(SampleConfig(chat=True, **keys)), system)


@pytest.fixture
def sample(root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*argv: str, typed: str = "", code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        common = [f"--out_dir={root / 'out'}", "--device=cpu", "--temperature=0"]
        assert cli.main(["sample", *common, *argv]) == code
        return capsys.readouterr()

    return run


def test_a_chat(sample: Any) -> None:
    out, err = sample("--chat", typed="ping\nmore\n/exit\nping\n")
    assert out == "pong\nno, me\n" and err == ""
    out, err = sample("--chat", typed="more\n\nPing\nping")  # ends at the end of the input
    assert out == "no, me\npong\n"
    assert err == (
        "error: messages[2].content: text has 'P' at position 0, which is not among the 10 "
        "characters of the vocabulary\n"
    )


def test_an_answer_grows_and_may_be_left(root: Path) -> None:
    chat = chat_of(root)
    answer = chat.say("more")
    assert next(answer) == "n" and next(answer) == "o" and chat.messages == []
    answer.close()
    assert chat.messages == [MORE[0], {"role": "assistant", "content": "no"}]
    assert not chat.cut
    "".join(chat.say("ping"))
    assert chat.messages[1]["content"] == "no" and chat.messages[2] == PING[0]


def test_what_does_not_fit_is_forgotten_from_the_oldest_on(root: Path, sample: Any) -> None:
    chat = chat_of(root, "go", max_new_tokens=6)
    forgotten = []
    for _ in range(4):
        assert "".join(chat.say("ping")) == "pong"
        assert chat.messages[0] == SYSTEM and chat.messages[-2:] == PING
        forgotten.append(chat.forgotten)
    assert forgotten == [0, 0, 2, 2]
    _, err = sample("--chat", "--system=go", typed="ping\n" * 3)
    assert err == "note: the oldest 2 messages no longer fit into the context and are forgotten\n"


def test_an_answer_that_is_cut(root: Path, sample: Any) -> None:
    chat = chat_of(root, max_new_tokens=2)
    assert "".join(chat.say("more")) == "no" and chat.cut
    out, err = sample("--chat", "--max_new_tokens=2", typed="more")
    assert out == "no\n" and "note: the answer was cut" in err


def test_a_message_that_is_too_long(sample: Any) -> None:
    out, err = sample("--chat", typed=f"{'o' * 28}\nping\n")
    assert out == "pong\n"  # the chat continues after the error
    assert err == (
        "error: the message makes a prompt of 32 tokens, but the model's context is 32, the answer "
        "included\n"
    )


def test_exact_matches_of_a_file(sample: Any, root: Path, tmp_path: Path) -> None:
    wrong = [PING[0], {"role": "assistant", "content": "no"}]
    write_dialogues([PING + MORE, wrong], tmp_path / "d.jsonl")
    for size in (1, 2, 64):
        out, _ = sample(f"--dialogues={tmp_path / 'd.jsonl'}", f"--batch_size={size}")
        assert out == "exact match: 2 of 3 answers (66.7%)\n"
    out, _ = sample(f"--dialogues={tmp_path / 'd.jsonl'}", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows[1] == {"question": "more", "answer": "no, me", "expected": "no, me", "forgotten": 0}
    assert rows[2] == {"question": "ping", "answer": "pong", "expected": "no", "forgotten": 0}
    for text, reason in (
        ("{}", f"line 1 of the input {tmp_path / 'd.jsonl'}: messages must be a list"),
        (json.dumps({"messages": PING[:1]}), "d.jsonl have no answer to compare with"),
    ):
        (tmp_path / "d.jsonl").write_text(text)
        assert reason in sample(f"--dialogues={tmp_path / 'd.jsonl'}", code=2)[1]


def test_what_a_question_of_a_file_does_not_see(sample: Any, tmp_path: Path) -> None:
    write_dialogues([PING * 4], tmp_path / "d.jsonl")
    out, err = sample(f"--dialogues={tmp_path / 'd.jsonl'}")
    assert out == "exact match: 4 of 4 answers (100.0%)\n"
    assert err == "note: 2 questions were asked without the oldest messages, which no longer fit\n"
    out, _ = sample(f"--dialogues={tmp_path / 'd.jsonl'}", "--json")
    assert [json.loads(line)["forgotten"] for line in out.splitlines()] == [0, 0, 2, 4]


def test_answers_are_those_of_any_batch_size(tmp_path: Path) -> None:
    """Each answer ends at the context length, also when others in the batch have more room."""
    keys: dict[str, Any] = {"out_dir": folder_of(tmp_path / "out", small_gpt(1)), "device": "cpu"}
    rows = [[{**PING[i], "content": "a" * n} for i, n in enumerate((n, 1))] for n in (1, 9, 4)]
    write_dialogues(rows, tmp_path / "d.jsonl")
    found = []
    for size in (1, 3):
        sampler = Sampler(SampleConfig(dialogues="d", temperature=0.0, batch_size=size, **keys))
        found.append([answer.answer for answer in answers(sampler, tmp_path / "d.jsonl")])
    assert found[0] == found[1] and len(found[0][1]) == 3


def test_the_names_of_the_tokens_in_a_plain_prompt(sample: Any) -> None:
    start = "<|dialogue|><|user|>ping<|end|><|assistant|>"
    out, _ = sample(f"--start={start}", "--stop=<|end|>", "--num_samples=1", "--json")
    assert json.loads(out)["completion"] == "pong"
    out, _ = sample("--num_samples=1", "--max_new_tokens=3", "--json")
    assert json.loads(out)["prompt"] == "<|dialogue|>"


def test_exported_for_others_and_for_ourselves(root: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf")
    out_dir, own = str(root / "out"), chat_of(root)._tokenizer
    written = export(ExportConfig(to="hf", out_dir=out_dir, output=tmp_path / "hf"))
    assert [note for note in written.notes if "tokenizer" in note] == []
    theirs = transformers.AutoTokenizer.from_pretrained(written.path, local_files_only=True)
    dialogue = [SYSTEM, *PING, MORE[0]]
    ids = theirs.apply_chat_template(dialogue, add_generation_prompt=True, return_dict=False)
    assert ids == template.prompt(own, dialogue)
    whole = theirs.apply_chat_template(dialogue[:3], return_dict=False)
    assert whole == template.encode(own, dialogue[:3])[0].tolist()
    assert theirs.decode(whole) == own.decode(whole) and theirs.eos_token_id == own.end
    path = tmp_path / "model.safetensors"
    export(ExportConfig(to="safetensors", out_dir=out_dir, output=path))
    assert "".join(chat_of(root, init_from=str(path)).say("ping")) == "pong"


def test_a_base_with_a_token_of_dialogues_is_exported_without_its_tokenizer(tmp_path: Path) -> None:
    """E.g. Phi-3's <|end|>: transformers would use the base tokenizer's id, not the model's."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")
    theirs = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}))
    theirs.add_special_tokens(["<|end|>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    own = packed(ChatTokenizer(JsonTokenizer(tmp_path / "tokenizer.json")))
    out_dir = folder_of(tmp_path / "out", small_gpt(), own)
    written = export(ExportConfig(to="hf", out_dir=out_dir, output=tmp_path / "hf"))
    assert any("no tokenizer: <|end|> has the id 2 in it, but 7 in the" in n for n in written.notes)
    assert not list(written.path.glob("tokenizer*"))


def test_wrong_arguments(sample: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for keys, reason in (
        ({"chat": True, "interactive": True}, "give --chat or --interactive, not both"),
        ({"chat": True, "json": True}, "json must be False with chat"),
        ({"system": "go"}, "system must be empty without chat, got 'go'"),
    ):
        with pytest.raises(ValueError, match=reason):
            SampleConfig(**keys)  # type: ignore[arg-type]
    for argv, reason in (
        (["--chat", "--system=Go"], "messages[0].content: text has 'G' at position 0"),
        (["--chat", f"--system={'o' * 26}"], "system makes 29 tokens, too many for the model's "),
        (["--dialogues=nowhere.jsonl"], "No such file or directory: nowhere.jsonl"),
    ):
        assert reason in sample(*argv, code=2)[1]
    data_set(tmp_path)
    trained(tmp_path, max_iters=1, always_save_checkpoint=True)
    assert cli.main(["sample", "--chat", f"--out_dir={tmp_path / 'out'}", "--device=cpu"]) == 2
    assert "chat and dialogues need a model that was fine-tuned on" in capsys.readouterr().err
