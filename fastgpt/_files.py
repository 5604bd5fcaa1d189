"""File helpers: atomic writes, exclusive locks on folders, checksums, safe reading."""

import contextlib
import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


def parsed_json(text: str | bytes) -> Any:
    """``json.loads``, with ValueError also for JSON that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def without_errno(error: BaseException) -> str:
    """The message of an error; for a system error its cause and path, without errno."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the block, raise write errors, such as a full disk, as an OSError that names ``path``,
    also if the temporary file of ``atomic_write`` could not be written.

    A write to an open file raises OSError without a path. Depending on how much is buffered,
    PyTorch's zip writer raises its own RuntimeError on top.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None or cause.errno is None:
            raise
        if cause.filename not in (None, str(_temporary(path))):
            raise
        raise OSError(cause.errno, os.strerror(cause.errno), str(path)) from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Yield a temporary file. At the end of the block it is synced to disk and renamed to ``path``;
    if the block raises or the process dies, ``path`` is unchanged.

    Raises OSError like ``writing``.
    """
    temporary = _temporary(path)
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


def check_folder(out_dir: Path, rule: str = "out_dir must be a folder") -> None:
    """Raise NotADirectoryError if ``out_dir`` or one of its parents is a file."""
    for folder in (out_dir, *out_dir.parents):
        if folder.is_file():
            raise NotADirectoryError(f"{rule}, but {folder} is a file")


def sync_folder(folder: Path) -> None:
    """Sync the folder's entries to the disk, so that a rename survives a power cut."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Lock ``folder`` against other processes within the block. The lock ends with the process;
    on systems other than POSIX there is none.

    Raises ValueError if another process holds the lock.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is writing to {folder}") from error
        yield
    finally:
        os.close(descriptor)


def write_json(value: Any, path: Path) -> None:
    """Write ``value`` as JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for data in iter(lambda: file.read(1 << 16), b""):
            digest.update(data)
    return digest.hexdigest()


@contextlib.contextmanager
def reading_checkpoint(path: Path) -> Iterator[None]:
    """Within the block, turn PyTorch's errors for a checkpoint that is damaged, or rejected by
    ``weights_only=True``, into a ValueError of one line that names ``path``.
    """
    try:
        yield
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
        objects = _foreign_objects(path)
        if objects:
            raise ValueError(
                f"{path} holds objects of {objects}, which PyTorch loads only by running code: if "
                "you trust the file, torch.load it with weights_only=False and torch.save it "
                "without them"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is not a checkpoint that torch.save wrote, or it is damaged: {reason}"
        ) from error


def _foreign_objects(path: Path) -> str:
    """The classes and functions that ``weights_only=True`` rejects; "" if there are none, or if
    ``torch.save`` did not write the file."""
    import torch  # not at the top: some commands do not need it

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError, OSError, EOFError, pickle.UnpicklingError):
        return ""
    return ", ".join(sorted(names))


def is_path(source: str) -> bool:
    """Whether ``source`` is a folder or file rather than the name of a published model: it exists,
    or has a path separator or the ending ``.safetensors``.
    """
    return (
        "/" in source
        or os.sep in source
        or source.endswith(".safetensors")
        or (source != "" and Path(source).exists())
    )
