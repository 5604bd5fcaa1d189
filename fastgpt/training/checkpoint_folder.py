"""The checkpoints in a run's folder.

- ``iter-0002000.pt``: the state before update 2000; in a sharded run a folder, ``iter-0002000``. A
  run is resumed from the newest. The last few and the best by validation loss are kept.
- ``ckpt.pt``: a copy of the best, or of the newest with ``always_save_checkpoint``, for nanoGPT and
  ``fastgpt sample``. Does not exist before the first evaluation, or if none was better than that of
  iteration 0; then ``fastgpt sample`` and ``export`` read the newest ``iter-*``.
"""

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from fastgpt._files import check_folder
from fastgpt.training import checkpoint as ckpt

_NAME = re.compile(r"iter-(\d{7,})(\.pt)?")
_T = TypeVar("_T")


def path_of(out_dir: Path, iteration: int, sharded: bool) -> Path:
    """The path of the state before update ``iteration``."""
    return out_dir / f"iter-{iteration:07d}{'' if sharded else '.pt'}"


def saved(out_dir: Path) -> list[Path]:
    """The checkpoints ``iter-*`` in the folder, newest first.

    Raises NotADirectoryError if ``out_dir`` is a file.
    """
    check_folder(out_dir)
    if not out_dir.is_dir():
        return []
    return sorted((p for p in out_dir.iterdir() if _NAME.fullmatch(p.name)), key=_by_name)[::-1]


def _by_name(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def newest(out_dir: Path) -> Path:
    """The checkpoint with the most iterations, including ``ckpt.pt``, nanoGPT's only one.

    Raises FileNotFoundError if there is none, ValueError if ``ckpt.pt`` is damaged.
    """
    iterations = {path: _by_name(path) for path in saved(out_dir)}
    best = out_dir / ckpt.BEST
    if best.exists():
        iterations[best] = int(ckpt.header(best)["iter_num"])
    if not iterations:
        raise FileNotFoundError(f"there is no {ckpt.BEST} or iter-*.pt in {out_dir}")
    return max(iterations, key=lambda path: iterations[path])  # prefers iter-* to an equal ckpt.pt


def for_sampling(out_dir: Path) -> tuple[Path, str | None]:
    """The checkpoint to sample from or to export: ``ckpt.pt``, or else the newest ``iter-*`` of a
    run that was stopped before it wrote one, with a note that says so.

    Raises FileNotFoundError if there is neither.
    """
    best = out_dir / ckpt.BEST
    if best.exists():
        return best, None
    paths = saved(out_dir)
    if not paths:
        raise FileNotFoundError(f"there is no checkpoint {best}, nor an iter-*.pt beside it")
    return paths[0], f"{out_dir} has no {ckpt.BEST} (best by validation loss) yet: using {paths[0]}"


def read_newest(out_dir: Path, read: Callable[[Path], _T]) -> tuple[_T, Path]:
    """The newest checkpoint as ``read`` returns it, and its path.

    Raises FileNotFoundError if there is none; ValueError, naming the newest intact one, if it is
    damaged.
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
        return f"The newest intact checkpoint is {path}: remove damaged ones to resume from it"
    return f"No intact checkpoint is left in {out_dir}"


def prune(out_dir: Path, keep_last: int, best_iter: int | None) -> None:
    """Remove all checkpoints but the newest ``keep_last`` and that of ``best_iter``."""
    for path in saved(out_dir)[keep_last:]:
        if _by_name(path) != best_iter:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or folder. If the process dies meanwhile, no partial folder has the name."""
    if path.is_dir():
        path = path.rename(path.with_name(f".{path.name}.tmp"))
        shutil.rmtree(path)
    else:
        path.unlink()


def archive_previous_run(out_dir: Path, names: Iterable[str] = ()) -> Path | None:
    """Move an earlier run's checkpoints, and the files and folders ``names``, into
    ``out_dir/previous-N``. Returns that folder, or None if there was nothing to move.
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
