"""The checkpoints in a run's folder.

- ``iter-0002000.pt``: the state before update 2000; in a sharded run a folder, ``iter-0002000``. A
  run that was stopped or killed goes on from the newest. The last few are kept, and the best by
  validation loss.
- ``ckpt.pt``: a copy of the best, or of the newest with ``always_save_checkpoint``; what nanoGPT
  and ``fastgpt sample`` read.
"""

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from fastgpt.training import checkpoint as ckpt

_NAME = re.compile(r"iter-(\d{7,})(\.pt)?")
_T = TypeVar("_T")


def path_of(out_dir: Path, iteration: int, sharded: bool) -> Path:
    """Where the state before update ``iteration`` lies."""
    return out_dir / f"iter-{iteration:07d}{'' if sharded else '.pt'}"


def saved(out_dir: Path) -> list[Path]:
    """The checkpoints of all iterations that are there, the newest first."""
    if not out_dir.is_dir():
        return []
    return sorted((p for p in out_dir.iterdir() if _NAME.fullmatch(p.name)), key=_by_name)[::-1]


def _by_name(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def newest(out_dir: Path) -> Path:
    """The checkpoint with the most iterations: ``ckpt.pt`` where nanoGPT wrote it.

    Raises FileNotFoundError if there is none, ValueError if ``ckpt.pt`` is damaged.
    """
    iterations = {path: _by_name(path) for path in saved(out_dir)}
    best = out_dir / ckpt.BEST
    if best.exists():
        iterations[best] = int(ckpt.header(best)["iter_num"])
    if not iterations:
        raise FileNotFoundError(f"there is no {ckpt.BEST} or iter-*.pt in {out_dir}")
    return max(iterations, key=lambda path: iterations[path])  # of equals the first: not ckpt.pt


def read_newest(out_dir: Path, read: Callable[[Path], _T]) -> tuple[_T, Path]:
    """What ``read`` makes of the newest checkpoint, and its path.

    Raises FileNotFoundError if there is none; ValueError if it is damaged, with the newest one that
    is not.
    """
    try:
        path = newest(out_dir)
        return read(path), path
    except ValueError as error:
        raise ValueError(f"{error}. {_advice(out_dir)}") from error


def _advice(out_dir: Path) -> str:
    for path in [*saved(out_dir), out_dir / ckpt.BEST]:
        try:
            ckpt.load(path, ckpt.FOR_RESUMING)
        except (ValueError, FileNotFoundError):
            continue
        return f"The newest intact checkpoint is {path}: remove what is damaged to go on from there"
    return f"No intact checkpoint is left in {out_dir}"


def prune(out_dir: Path, keep_last: int, best_iter: int | None) -> None:
    """Remove the checkpoints of iterations that are neither among the last nor the best."""
    for path in saved(out_dir)[keep_last:]:
        if _by_name(path) != best_iter:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder; whenever the process dies, there is no half of it under its
    name.
    """
    if path.is_dir():
        path = path.rename(path.with_name(f".{path.name}.tmp"))
        shutil.rmtree(path)
    else:
        path.unlink()


def archive_previous_run(out_dir: Path, names: Iterable[str] = ()) -> Path | None:
    """Move an earlier run's checkpoints, and the files and folders ``names``, out of the way of a
    new run, into ``out_dir/previous-N``.

    Returns that folder, or None if there was nothing to move.
    """
    others = (out_dir / name for name in (ckpt.BEST, *names))
    found = [*saved(out_dir), *(path for path in others if path.exists())]
    if not found:
        return None
    number = 1
    while (out_dir / f"previous-{number}").exists():
        number += 1
    folder = out_dir / f"previous-{number}"
    folder.mkdir()
    for path in found:
        path.rename(folder / path.name)
    return folder
