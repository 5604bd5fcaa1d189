"""The built-in text; the download of Tiny Shakespeare, from a server on the loopback interface."""

import hashlib
import http.server
import os
import socket
import sysconfig
import threading
import time
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

STAND_IN = b"First Citizen: before we proceed any further, hear me speak.\n" * 5000
Respond = Callable[[http.server.BaseHTTPRequestHandler], None]
HUNG_UP = threading.Event()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Respond], str]]:
    """Start a server that answers every request by ``respond``; return its URL. ``STAND_IN``
    replaces Tiny Shakespeare.
    """
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(builtin_texts, "SHAKESPEARE_BYTES", len(STAND_IN))
    monkeypatch.setattr(builtin_texts, "SHAKESPEARE_SHA256", hashlib.sha256(STAND_IN).hexdigest())
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


def sends(body: bytes, length: int | None = None) -> Respond:
    def send(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        if length is not None:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(body)

    return send


def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
    try:
        sends(STAND_IN)(handler)
        for _ in range(300):  # 90 MB
            handler.wfile.write(STAND_IN)
    except ConnectionError:
        HUNG_UP.set()


def silent(handler: http.server.BaseHTTPRequestHandler) -> None:
    sends(STAND_IN[:1000], len(STAND_IN))(handler)
    time.sleep(1)


HALF = STAND_IN[: len(STAND_IN) // 2]


@pytest.mark.parametrize("length", [len(STAND_IN), None])
def test_a_download_is_taken_as_it_is(length: int, serve: Callable[[Respond], str]) -> None:
    assert shakespeare_text(serve(sends(STAND_IN, length))).encode() == STAND_IN


@pytest.mark.parametrize(
    ("respond", "error", "message"),
    [
        (sends(STAND_IN[:-2] + b"!\n"), ValueError, "URL is not Tiny Shakespeare: its SHA-256 is"),
        (sends(HALF, len(STAND_IN)), ConnectionError, f"URL sent {len(HALF)} bytes instead of"),
        (sends(HALF), ConnectionError, f"URL sent {len(HALF)} bytes instead of"),
        (endless, ConnectionError, f"URL sent more than {len(STAND_IN)} bytes"),
        (silent, ConnectionError, "could not download URL: timed out.*--input FILE"),
        (
            lambda handler: handler.send_error(404),
            ConnectionError,
            "could not download URL: HTTP Error 404.*--input FILE",
        ),
        (
            lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH_9.9\r\n"),
            ConnectionError,
            "could not download URL: SSH-2.0-OpenSSH_9.9. Without .*--input FILE",
        ),
    ],
    ids=["checksum", "cut", "cut, no length", "endless", "silent", "404", "no HTTP"],
)
def test_a_failed_download_is_told(
    respond: Respond,
    error: type[Exception],
    message: str,
    serve: Callable[[Respond], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if respond is silent:
        monkeypatch.setattr(builtin_texts, "_TIMEOUT_S", 0.2)
    url = serve(respond)
    with pytest.raises(error, match=message.replace("URL", url)):
        shakespeare_text(url)
    assert respond is not endless or HUNG_UP.wait(60)


def test_a_refused_connection_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/input.txt"
        with pytest.raises(ConnectionError, match=f"could not download {url}.*--input FILE"):
            shakespeare_text(url)


def test_tiny_shakespeare(tmp_path: Path) -> None:
    """The real file, from the local disk: sizes, checksum, characters."""
    default = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt"
    path = Path(os.environ.get("FASTGPT_TINYSHAKESPEARE", default))
    if not path.is_file():
        pytest.skip("Tiny Shakespeare is not here: let FASTGPT_TINYSHAKESPEARE name the file")
    source = TextSource(shakespeare_text(path.resolve().as_uri()))
    manifest = prepare(source, characters_of(source), tmp_path)
    tokens = {name: split.tokens for name, split in manifest.splits.items()}
    assert tokens == {"train": 1_003_854, "val": 111_540} and manifest.vocab_size == 65
    text = "".join(texts_of(tmp_path, CharTokenizer.load(tmp_path / "meta.pkl")))
    assert text.encode() == path.read_bytes()
