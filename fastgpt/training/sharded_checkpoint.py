"""Checkpoints of sharded runs: a folder to which each rank writes its own shards
(``torch.distributed.checkpoint``), and which any number of ranks can read.

    iter-0002000/
        .metadata, __0_0.distcp, ...   the tensors: "model.<name>", "optimizer.<index>.<name>"
        run.pt                         everything else that ``checkpoint.py`` lists
        complete.json                  size and SHA-256 of each of these files; written last

The folder is renamed to its final name after that. Nothing in it is executed: tensors and
``run.pt`` load with ``weights_only=True``, and the pickled ``.metadata`` may only name classes that
describe tensors.
"""

import contextlib
import pickle
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from fastgpt._files import atomic_write, parsed_json, sha256_of, sync_folder, write_json
from fastgpt.training.distributed import ALONE, World

_METADATA, _REST, _COMPLETE = ".metadata", "run.pt", "complete.json"
_DAMAGED = "is not a complete checkpoint, or it is damaged"


def save(checkpoint: dict[str, Any], path: Path, world: World) -> None:
    """Write ``checkpoint``, whose tensors may be shards, to the folder ``path``. Collective: every
    rank must call it. If one dies, ``path`` is complete or absent. An existing folder is replaced
    by two renames, between which it is called ``.{name}.old``.

    Raises OSError if a rank could not write.
    """
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    if world.is_main:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)
        temporary.mkdir()
    world.barrier()
    tensors, rest = _split(checkpoint)
    try:
        with _quiet():
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary, sync_files=True))
    except CheckpointException as error:
        raise OSError(f"could not write {temporary}: {error}") from error
    if world.is_main:
        with atomic_write(temporary / _REST) as file:
            torch.save(rest, file)
    world.barrier()
    names = sorted(file.name for file in temporary.iterdir())[world.rank :: world.size]
    mine = {name: _measured(temporary / name) for name in names}
    files = {name: value for part in world.all_gather_object(mine) for name, value in part.items()}
    if world.is_main:
        write_json(dict(sorted(files.items())), temporary / _COMPLETE)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    world.barrier()


def _split(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split into the tensors of model and optimizer, tied ones once, and everything else."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # by the id of each tensor so far
    tied: dict[str, str] = {}
    for name, tensor in checkpoint["model"].items():
        if id(tensor) in names:
            tied[name] = names[id(tensor)]
        else:
            names[id(tensor)] = name
            tensors[f"model.{name}"] = tensor
    for index, state in checkpoint["optimizer"]["state"].items():
        tensors.update({f"optimizer.{index}.{name}": value for name, value in state.items()})
    rest = {
        **checkpoint,
        "model": {"tied": tied},
        "optimizer": {"param_groups": checkpoint["optimizer"]["param_groups"]},
    }
    return tensors, rest


def _measured(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def check(path: Path, world: World = ALONE) -> None:
    """Verify the checksum of every file in the folder. Collective: the ranks share the files.

    Raises ValueError if one is missing or damaged.
    """
    try:
        files = parsed_json((path / _COMPLETE).read_text(encoding="utf-8"))
        if _REST not in files:
            raise ValueError(f"it does not list {_REST}")
        wrong = [
            name
            for name in sorted(files)[world.rank :: world.size]
            if Path(name).name != name
            or not (path / name).is_file()
            or _measured(path / name) != files[name]
        ]
    except (FileNotFoundError, IsADirectoryError):
        wrong = [_COMPLETE]
    except (ValueError, TypeError) as error:
        wrong = [f"{_COMPLETE} ({error})"]
    wrong = [name for part in world.all_gather_object(wrong) for name in part]
    if wrong:
        raise ValueError(f"{path} {_DAMAGED}: {', '.join(sorted(set(wrong)))}")


def header(path: Path) -> dict[str, Any]:
    """The checkpoint without its tensors.

    Raises ValueError if it cannot be read.
    """
    try:
        return torch.load(path / _REST, weights_only=True)
    except (FileNotFoundError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} {_DAMAGED}: {_REST}: {error}") from error


def load(path: Path) -> dict[str, Any]:
    """The checkpoint in the form that a single process would have written, tensors on the CPU.

    Raises ValueError if it is damaged.
    """
    check(path)
    checkpoint = header(path)
    tensors = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in _Reader(path).read_metadata().state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)  # as all are
    }
    _read(tensors, path, no_dist=True)
    model: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, name = key.split(".", 1)
        if part == "model":
            model[name] = tensor
        else:
            index, name = name.split(".", 1)
            state.setdefault(int(index), {})[name] = tensor
    for name, first in checkpoint["model"]["tied"].items():
        model[name] = model[first]
    checkpoint["model"] = model
    checkpoint["optimizer"]["state"] = dict(sorted(state.items()))
    return checkpoint


def load_into(
    model: nn.Module, state: dict[int, dict[str, Tensor]], path: Path
) -> dict[int, dict[str, Tensor]]:
    """Read this rank's shards of the weights into ``model``, and those of the optimizer's tensors
    into ``state``, which is returned. The checkpoint may be sharded differently. Collective: every
    rank must call it.

    Raises ValueError if the checkpoint is of another model.
    """
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for index, entries in state.items():
        tensors.update({f"optimizer.{index}.{name}": value for name, value in entries.items()})
    _read(tensors, path, no_dist=False)
    return state


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress PyTorch's warning that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _read(tensors: dict[str, Tensor], path: Path, no_dist: bool) -> None:
    try:
        with _quiet():
            dcp.load(tensors, storage_reader=_Reader(path), no_dist=no_dist)
    except CheckpointException as error:
        reasons = "; ".join(str(failure[0]) for failure in error.failures.values())
        raise ValueError(f"{path} has no state to resume from: {reasons}") from error


class _Unpickler(pickle.Unpickler):
    """Only accepts classes that describe tensors."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "pathlib._local":  # the module of Path in Python 3.13 alone
            module = "pathlib"
        known = (module, name) in _KNOWN
        if module == "torch":
            known = known or isinstance(getattr(torch, name, None), torch.dtype)
        if module == dcp.metadata.__name__:
            known = getattr(getattr(dcp.metadata, name, None), "__module__", None) == module
        if not known:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong into {_METADATA}")
        return super().find_class(module, name)


_KNOWN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}


class _Reader(dcp.FileSystemReader):
    """PyTorch's reader, without its unrestricted unpickling of ``.metadata``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._metadata = path / _METADATA

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            with open(self._metadata, "rb") as file:
                metadata: Metadata = _Unpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise ValueError(f"{self._metadata} {_DAMAGED}: {error}") from error
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata
