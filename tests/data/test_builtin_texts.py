"""Data sets from texts: what is written, what is refused, and what a failure leaves behind.

Downloads come from a server on the loopback interface.
"""

import contextlib
import functools
import hashlib
import http.server
import os
import signal
import socket
import sysconfig
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fastgpt import _progress
from fastgpt.data import builtin_texts, file_formats
from fastgpt.data.batches import Batches
from fastgpt.data.builtin_texts import (
    Prepared,
    prepare_builtin,
    prepare_file,
    prepare_shakespeare,
    prepare_text,
)
from fastgpt.tokenizer import CharTokenizer

TEXT = "naïve\r\nΩ 文 🙂; the quick brown fox\n" * 7
NAMES = ["meta.pkl", "train.bin", "val.bin"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded(data_dir: Path) -> tuple[str, str]:
    tokenizer = CharTokenizer.load(data_dir / "meta.pkl")
    train, val = (np.fromfile(data_dir / f"{s}.bin", dtype=np.uint16) for s in ("train", "val"))
    return tokenizer.decode(train), tokenizer.decode(val)


@pytest.fixture
def earlier(tmp_path: Path) -> Iterator[Path]:
    """A folder with an earlier preparation, which must be the same at the end."""
    out_dir = tmp_path / "earlier"
    prepare_text("an earlier preparation", out_dir)
    before = contents(out_dir)
    yield out_dir
    assert contents(out_dir) == before


# ---- prepare_text


@pytest.mark.parametrize("span", [1 << 22, 5])
def test_the_first_nine_tenths_train(
    span: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_progress, "SPAN", span)
    out_dir = tmp_path / "new" / "data"
    prepared = prepare_text(TEXT, out_dir)
    cut = int(0.9 * len(TEXT))
    assert prepared == Prepared(out_dir, len(set(TEXT)), cut, len(TEXT) - cut)
    assert sorted(os.listdir(out_dir)) == NAMES
    assert decoded(out_dir) == (TEXT[:cut], TEXT[cut:])


def test_the_shortest_text_is_usable(tmp_path: Path) -> None:
    prepared = prepare_text("hello world", tmp_path / "data")
    assert (prepared.train_tokens, prepared.val_tokens) == (9, 2)
    x, y = Batches(tmp_path / "data", 1, 1, "cpu", 0, prepared.vocab_size).next("val")
    assert x.shape == y.shape == (1, 1)


def test_a_new_preparation_replaces_an_earlier_one(tmp_path: Path) -> None:
    prepare_text("an earlier preparation", tmp_path)
    reader = Batches(tmp_path, 2, 1, "cpu", 0)
    before = [reader.next("train") for _ in range(2)]
    prepare_text(TEXT, tmp_path)
    assert "".join(decoded(tmp_path)) == TEXT
    # A run that is reading the old files keeps reading them.
    again = Batches(tmp_path, 2, 1, "cpu", 0)
    fresh = [reader.next("train") for _ in range(50)]
    assert max(int(x.max()) for x, _ in before + fresh) < len(set("an earlier preparation"))
    assert max(int(again.next("train")[0].max()) for _ in range(50)) > 15


@pytest.mark.parametrize("text", ["", "ten chars!"])
def test_a_text_too_short_to_split_is_refused(text: str, earlier: Path) -> None:
    with pytest.raises(ValueError, match=f"has {len(text)} characters, .* at least 11"):
        prepare_text(text, earlier)


def test_too_many_characters_are_refused(earlier: Path) -> None:
    text = "".join(chr(i) for i in range(65537))
    with pytest.raises(ValueError, match="1 to 65536 distinct characters .* got 65537"):
        prepare_text(text, earlier)


def test_out_dir_must_be_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("keep me")
    for prepare in (
        functools.partial(prepare_text, TEXT),
        functools.partial(prepare_shakespeare, url="http://127.0.0.1:9/"),
    ):
        with pytest.raises(NotADirectoryError, match=r"out_dir must be a folder, .*file"):
            prepare(path)
    assert path.read_text() == "keep me"


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_tokens_that_were_not_prepared_here_are_kept(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"hours of BPE")
    with pytest.raises(FileExistsError, match=rf"{name} exists without a meta\.pkl"):
        prepare_text(TEXT, tmp_path)
    assert contents(tmp_path) == {name: b"hours of BPE"}


def test_a_data_set_with_a_manifest_is_kept(tmp_path: Path) -> None:
    prepare_text(TEXT, tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"data set with a manifest\.json, .* not replaced"):
        prepare_text(TEXT, tmp_path)
    assert contents(tmp_path) == before


def test_a_large_file_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_formats, "_CHUNK", 1 << 14)
    path = tmp_path / "large.txt"
    path.write_bytes(b"To be, or not to be.\n" * 300_000)  # 6.3 MB
    prepare_text(TEXT, tmp_path / "warm")
    tracemalloc.start()
    prepare_file(path, tmp_path / "data")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 << 20  # of which 1.1 MB is a flag for each Unicode character


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failure_while_writing_leaves_nothing(
    error: type[BaseException], earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: CharTokenizer, path: Path) -> None:
        assert sorted(os.listdir(path.parent)) == ["train.bin", "val.bin"]  # aside, in out_dir
        assert path.parent.parent == earlier
        raise error("stopped")

    monkeypatch.setattr(CharTokenizer, "save", fail)
    with pytest.raises(error, match="stopped"):
        prepare_text(TEXT, earlier)


# ---- prepare_file and prepare_builtin


def test_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "input.txt"
    path.write_bytes("\ufeff".encode() + TEXT.encode())
    prepare_file(path, tmp_path / "data")
    assert "".join(decoded(tmp_path / "data")) == "\ufeff" + TEXT


def test_an_unusable_file_is_named(tmp_path: Path, earlier: Path) -> None:
    path = tmp_path / "input.txt"
    with pytest.raises(FileNotFoundError, match=r"input\.txt does not exist"):
        prepare_file(path, earlier)
    with pytest.raises(IsADirectoryError, match="is a folder, but must be one UTF-8 text file"):
        prepare_file(tmp_path, earlier)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"input\.txt is empty"):
        prepare_file(path, earlier)
    path.write_bytes(TEXT.encode() + b"caf\xe9 au lait")
    position = len(TEXT.encode()) + 3
    with pytest.raises(
        ValueError, match=rf"input\.txt is not UTF-8: byte 0xe9 at position {position}"
    ):
        prepare_file(path, earlier)
    path.write_bytes(b"too short")
    with pytest.raises(ValueError, match="has 9 characters"):
        prepare_file(path, earlier)


def test_the_builtin_corpus_is_the_standard_library(tmp_path: Path) -> None:
    prepared = prepare_builtin(tmp_path / "a")
    text = "".join(decoded(prepared.data_dir))
    assert prepared.train_tokens + prepared.val_tokens == len(text)
    assert 1_000_000 < len(text) < 10_000_000 and text.isascii()
    sources = [
        Path(sysconfig.get_path("stdlib"), name).read_bytes().decode()
        for name in ("abc.py", "argparse.py", "textwrap.py", "zipapp.py")
    ]
    places = [text.index(source) for source in sources]
    assert places == sorted(places)
    prepare_builtin(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_without_library_sources_another_input_is_named(
    earlier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nowhere/python.zip")
    with pytest.raises(FileNotFoundError, match=r"python\.zip has none; .*--input FILE"):
        prepare_builtin(earlier)


# ---- prepare_shakespeare

Respond = Callable[[http.server.BaseHTTPRequestHandler], None]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Respond], str]]:
    """Start a server that answers every request by ``respond``; gives its URL."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers: list[http.server.HTTPServer] = []

    def start(respond: Respond) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                respond(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/input.txt"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(
    handler: http.server.BaseHTTPRequestHandler, body: bytes, length: int | None = None
) -> None:
    handler.send_response(200)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    handler.end_headers()
    handler.wfile.write(body)


def sends(body: bytes, length: int | None = None) -> Respond:
    return lambda handler: send(handler, body, length)


@pytest.fixture
def shakespeare() -> bytes:
    default = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt"
    path = Path(os.environ.get("FASTGPT_TINYSHAKESPEARE", default))
    if not path.is_file():
        pytest.skip("Tiny Shakespeare is not here: let FASTGPT_TINYSHAKESPEARE name the file")
    return path.read_bytes()


@pytest.mark.parametrize("with_length", [True, False])
def test_tiny_shakespeare(
    with_length: bool, serve: Callable[[Respond], str], shakespeare: bytes, tmp_path: Path
) -> None:
    out_dir = tmp_path / "data"
    url = serve(sends(shakespeare, len(shakespeare) if with_length else None))
    prepared = prepare_shakespeare(out_dir, url=url)
    assert prepared == Prepared(out_dir, 65, 1_003_854, 111_540)
    assert "".join(decoded(out_dir)).encode() == shakespeare
    assert sorted(os.listdir(out_dir)) == NAMES


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A text that takes Tiny Shakespeare's place, so that these tests need no file."""
    body = b"First Citizen: before we proceed any further, hear me speak.\n" * 5000
    monkeypatch.setattr(builtin_texts, "SHAKESPEARE_BYTES", len(body))
    monkeypatch.setattr(builtin_texts, "SHAKESPEARE_SHA256", hashlib.sha256(body).hexdigest())
    return body


def test_a_download_becomes_a_data_set(
    serve: Callable[[Respond], str], stand_in: bytes, tmp_path: Path
) -> None:
    prepare_shakespeare(tmp_path / "data", url=serve(sends(stand_in, len(stand_in))))
    assert "".join(decoded(tmp_path / "data")).encode() == stand_in


def test_a_wrong_checksum_is_refused(
    serve: Callable[[Respond], str], stand_in: bytes, earlier: Path
) -> None:
    url = serve(sends(stand_in[:-2] + b"!\n", len(stand_in)))
    wanted = hashlib.sha256(stand_in).hexdigest()
    with pytest.raises(ValueError, match=f"{url} is not Tiny Shakespeare.*expected {wanted}"):
        prepare_shakespeare(earlier, url=url)


@pytest.mark.parametrize("with_length", [True, False])
def test_a_cut_off_transfer_is_refused(
    with_length: bool, serve: Callable[[Respond], str], stand_in: bytes, earlier: Path
) -> None:
    half = stand_in[: len(stand_in) // 2]
    url = serve(sends(half, len(stand_in) if with_length else None))
    with pytest.raises(ConnectionError, match=f"{url}.* {len(half)} bytes"):
        prepare_shakespeare(earlier, url=url)


def test_an_endless_answer_is_cut(
    serve: Callable[[Respond], str], stand_in: bytes, earlier: Path
) -> None:
    sent = 0

    def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
        nonlocal sent
        send(handler, b"")
        with contextlib.suppress(ConnectionError):  # the client hangs up
            while sent < 100 << 20:
                handler.wfile.write(stand_in)
                sent += len(stand_in)

    with pytest.raises(ConnectionError, match=f"more than {len(stand_in)} bytes"):
        prepare_shakespeare(earlier, url=serve(endless))
    assert sent < 100 << 20


def test_a_server_error_is_told(
    serve: Callable[[Respond], str], stand_in: bytes, earlier: Path
) -> None:
    url = serve(lambda handler: handler.send_error(404))
    with pytest.raises(ConnectionError, match=rf"{url}: HTTP Error 404.*--input FILE"):
        prepare_shakespeare(earlier, url=url)


def test_an_answer_that_is_not_http_is_told(
    serve: Callable[[Respond], str], stand_in: bytes, earlier: Path
) -> None:
    def greet(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n")

    url = serve(greet)
    with pytest.raises(ConnectionError, match=f"could not download {url}"):
        prepare_shakespeare(earlier, url=url)


def test_a_refused_connection_is_told(
    earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/input.txt"
        for out_dir in (earlier, tmp_path / "new"):
            with pytest.raises(ConnectionError, match=f"could not download {url}.*--input FILE"):
                prepare_shakespeare(out_dir, url=url)
    assert not (tmp_path / "new").exists()


def test_a_silent_server_is_given_up(
    serve: Callable[[Respond], str],
    stand_in: bytes,
    earlier: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = threading.Event()

    def silent(handler: http.server.BaseHTTPRequestHandler) -> None:
        send(handler, stand_in[:1000], len(stand_in))
        done.wait(10)

    monkeypatch.setattr(builtin_texts, "_TIMEOUT_S", 0.2)
    with pytest.raises(ConnectionError, match="timed out"):
        prepare_shakespeare(earlier, url=serve(silent))
    done.set()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_an_interrupted_download_leaves_nothing(
    serve: Callable[[Respond], str], stand_in: bytes, earlier: Path
) -> None:
    done = threading.Event()

    def interrupt(handler: http.server.BaseHTTPRequestHandler) -> None:
        send(handler, stand_in[: len(stand_in) // 2], len(stand_in))
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
        done.wait(10)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            prepare_shakespeare(earlier, url=serve(interrupt))
    finally:
        signal.signal(signal.SIGINT, before)
        done.set()
