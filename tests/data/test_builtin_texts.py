"""The built-in text; the download of Tiny Shakespeare, from a server on the loopback interface."""

import contextlib
import hashlib
import http.server
import os
import socket
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastgpt.data import builtin_texts
from fastgpt.data.builtin_texts import builtin_text, prepare_builtin, shakespeare_text
from fastgpt.data.prepare import characters_of, prepare
from fastgpt.data.sources import TextSource
from fastgpt.tokenizer import CharTokenizer
from tests.data.test_prepare import contents, texts_of


def test_the_builtin_corpus_is_the_standard_library(tmp_path: Path) -> None:
    manifest = prepare_builtin(tmp_path / "a")
    tokenizer = CharTokenizer.load(tmp_path / "a" / "meta.pkl")
    text = "".join(texts_of(tmp_path / "a", tokenizer))
    assert text == builtin_text() and manifest.vocab_size == tokenizer.vocab_size
    assert 1_000_000 < len(text) < 10_000_000 and text.isascii()
    sources = [
        Path(sysconfig.get_path("stdlib"), name).read_bytes().decode()
        for name in ("abc.py", "argparse.py", "textwrap.py", "zipapp.py")
    ]
    places = [text.index(source) for source in sources]
    assert places == sorted(places)
    prepare_builtin(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_without_library_sources_another_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nowhere/python.zip")
    with pytest.raises(FileNotFoundError, match=r"python\.zip has none; .*--input FILE"):
        builtin_text()


# ---- the download

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
    url = serve(sends(shakespeare, len(shakespeare) if with_length else None))
    source = TextSource(shakespeare_text(url))
    manifest = prepare(source, characters_of(source), tmp_path)
    tokens = {name: split.tokens for name, split in manifest.splits.items()}
    assert tokens == {"train": 1_003_854, "val": 111_540} and manifest.vocab_size == 65
    text = "".join(texts_of(tmp_path, CharTokenizer.load(tmp_path / "meta.pkl")))
    assert text.encode() == shakespeare


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A text that takes Tiny Shakespeare's place, so that these tests need no file."""
    body = b"First Citizen: before we proceed any further, hear me speak.\n" * 5000
    monkeypatch.setattr(builtin_texts, "SHAKESPEARE_BYTES", len(body))
    monkeypatch.setattr(builtin_texts, "SHAKESPEARE_SHA256", hashlib.sha256(body).hexdigest())
    return body


def test_a_download_is_taken_as_it_is(serve: Callable[[Respond], str], stand_in: bytes) -> None:
    assert shakespeare_text(serve(sends(stand_in, len(stand_in)))).encode() == stand_in


def test_a_wrong_checksum_is_refused(serve: Callable[[Respond], str], stand_in: bytes) -> None:
    url = serve(sends(stand_in[:-2] + b"!\n", len(stand_in)))
    wanted = hashlib.sha256(stand_in).hexdigest()
    with pytest.raises(ValueError, match=f"{url} is not Tiny Shakespeare.*expected {wanted}"):
        shakespeare_text(url)


@pytest.mark.parametrize("with_length", [True, False])
def test_a_cut_off_transfer_is_refused(
    with_length: bool, serve: Callable[[Respond], str], stand_in: bytes
) -> None:
    half = stand_in[: len(stand_in) // 2]
    url = serve(sends(half, len(stand_in) if with_length else None))
    with pytest.raises(ConnectionError, match=f"{url}.* {len(half)} bytes"):
        shakespeare_text(url)


def test_an_endless_answer_is_cut(serve: Callable[[Respond], str], stand_in: bytes) -> None:
    sent = 0

    def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
        nonlocal sent
        send(handler, b"")
        with contextlib.suppress(ConnectionError):  # the client hangs up
            while sent < 100 << 20:
                handler.wfile.write(stand_in)
                sent += len(stand_in)

    with pytest.raises(ConnectionError, match=f"more than {len(stand_in)} bytes"):
        shakespeare_text(serve(endless))
    assert sent < 100 << 20


def greet(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n")


@pytest.mark.parametrize(
    ("respond", "message"),
    [
        (lambda handler: handler.send_error(404), "HTTP Error 404.*--input FILE"),
        (greet, "--input FILE"),
    ],
    ids=["404", "no HTTP"],
)
def test_a_wrong_answer_is_told(
    respond: Respond, message: str, serve: Callable[[Respond], str], stand_in: bytes
) -> None:
    url = serve(respond)
    with pytest.raises(ConnectionError, match=f"could not download {url}: .*{message}"):
        shakespeare_text(url)


def test_a_refused_connection_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/input.txt"
        with pytest.raises(ConnectionError, match=f"could not download {url}.*--input FILE"):
            shakespeare_text(url)


def test_a_silent_server_is_given_up(
    serve: Callable[[Respond], str], stand_in: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()

    def silent(handler: http.server.BaseHTTPRequestHandler) -> None:
        send(handler, stand_in[:1000], len(stand_in))
        done.wait(10)

    monkeypatch.setattr(builtin_texts, "_TIMEOUT_S", 0.2)
    with pytest.raises(ConnectionError, match="timed out"):
        shakespeare_text(serve(silent))
    done.set()
