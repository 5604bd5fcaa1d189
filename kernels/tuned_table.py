"""The file of ``fastgpt tune``: the launch configurations that are fastest on one GPU.

It is valid only for that GPU, its driver, this PyTorch, this Triton and these kernels. These
determine its name, ``GPU-HASH.json``, and are repeated under "made_for"; a "sha256" of the rest
detects damage. The folder is ``$FASTGPT_TUNED``, else ``$XDG_CACHE_HOME/fastgpt/tuned``, by default
``~/.cache/fastgpt/tuned``. If ``FASTGPT_TUNED`` is set but empty, no file is read.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

VARIABLE = "FASTGPT_TUNED"
_DRIVER = Path("/proc/driver/nvidia/version")


def folder() -> Path | None:
    """The folder of the files; None if there are to be none, or if the home folder is unknown."""
    own = os.environ.get(VARIABLE)
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        if own is not None:
            return Path(own).expanduser() if own else None
        return Path(cache).expanduser() / "fastgpt" / "tuned"
    except RuntimeError:  # a user without a name, as in some containers
        return None


@functools.cache
def made_for(device: torch.device) -> dict[str, str]:
    """What a measured entry is valid for."""
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "interpreter",
        "driver": _driver() if on_gpu else "",
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "kernels": _hash_of_kernels(),
    }


def _driver() -> str:
    """The driver's version, or at least its CUDA version if Linux's file is missing."""
    try:
        found = re.search(r"Kernel Module\D*(\d[\d.]*)", _DRIVER.read_text())
    except OSError:
        found = None
    version = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")  # CUDA builds have it
    return found[1] if found else f"CUDA {version()}"


@functools.cache
def _hash_of_kernels() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def path_of(device: torch.device) -> Path | None:
    """The path of the device's file, which need not exist; None without a ``folder``."""
    where = folder()
    if where is None:
        return None
    facts = made_for(device)
    gpu = re.sub(r"\W+", "-", facts["gpu"])
    return where / f"{gpu}-{checksum(facts)[:12]}.json"


def checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read(device: torch.device) -> dict[str, Any]:
    """The content of the device's file; empty if there is none.

    Raises:
        ValueError: it is damaged, or was made for something else.
        OSError: it cannot be read.
    """
    path = path_of(device)
    if path is None or not path.exists():
        return {}
    try:
        held = json.loads(path.read_text())
    except RecursionError:
        raise ValueError("damaged") from None
    if not isinstance(held, dict) or held.pop("sha256", "") != checksum(held):
        raise ValueError("damaged")
    for name, fact in made_for(device).items():
        if held["made_for"].get(name) != fact:
            raise ValueError(f"made for {name} {held['made_for'].get(name)!r}, not {fact!r}")
    return held


@contextlib.contextmanager
def notice_of_damage(device: torch.device) -> Iterator[None]:
    """Context in which a file that cannot be used is ignored with a warning."""
    try:
        yield
    except OSError as error:  # such as a folder, which fastgpt tune cannot replace
        warnings.warn(f"{error.filename} is ignored: {error.strerror}", stacklevel=2)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        warnings.warn(
            f"{path_of(device)} is ignored ({error}): fastgpt tune makes a new one", stacklevel=2
        )
