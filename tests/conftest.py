"""Setup for each test: interpreted kernels on the CPU, one thread, a seed of its own, and memory
from ``torch.empty`` filled with NaN.
"""

import os

# Before torch is imported; pytest-xdist already occupies the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["FASTGPT_TUNED"] = ""  # ignore entries that ``fastgpt tune`` measured here

import functools
import gc
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils import _device

from fastgpt import devices
from fastgpt.kernels import _host, fused, reference, torch_ops
from tests.tools import broken_gpu, interpreter
from tests.tools.sanitizer import sanitize

with suppress(ImportError):  # in the extra "test"; without it its tests are skipped
    import hypothesis

    _common: Any = dict(
        deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    # Failures are not shrunk: that may take minutes.
    _phases = [
        hypothesis.Phase.explicit,
        hypothesis.Phase.generate,
    ]
    hypothesis.settings.register_profile(
        "small", max_examples=30, derandomize=True, phases=_phases, **_common
    )
    hypothesis.settings.register_profile("large", max_examples=2000, **_common)
    hypothesis.settings.load_profile("small")


def _poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = allocate(*args, **kwargs)
        # While a graph is traced, the fill would become part of it.
        traced = torch.compiler.is_compiling() or isinstance(out, FakeTensor)
        if out.is_floating_point() and not traced:
            with torch.no_grad():
                out.fill_(float("nan"))
        return out

    return allocate_poisoned


def _poison_uninitialised_memory() -> None:
    """Let an output that a kernel forgot to write show as NaN. Never undone, because torch.compile
    remembers the functions it has seen."""
    # Builds and caches the list of functions that ``with torch.device(...)`` patches.
    _device._device_constructors()
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
        (Tensor, "new_empty_strided"),
    ):
        setattr(owner, name, _poisoning(getattr(owner, name)))


def _skipping(op: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(op)
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, Tensor) and x.is_cuda:
            pytest.skip("Triton does not use the tensor cores of this GPU")
        return op(x, *args, **kwargs)

    return call


def _skip_matrix_products() -> None:
    """On a GPU limited to ``fused_rows``, skip tests that call one of the other kernels."""
    for name in reference.OPS_OF_TENSOR_CORES:
        setattr(fused, name, _skipping(getattr(fused, name)))


gc.set_threshold(10_000)  # each collection scans half a million imported objects
# A shell's background jobs ignore Ctrl-C, and so would the processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
interpreter.install()
_host.INTERPRETED = True
_poison_uninitialised_memory()
if torch.cuda.is_available() and not devices.triton_multiplies(torch.device("cuda", 0)):
    _skip_matrix_products()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ptx",
        type=int,
        choices=[75, 80, 90],
        help="run kernels on CPU tensors as compiled for this architecture, in the PTX machine",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(broken_gpu)
    if config.getoption("--ptx"):
        from tests.tools.ptx.plugin import CompiledKernels

        config.pluginmanager.register(CompiledKernels(config.getoption("--ptx")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests first, so that no worker is left with them at the end."""
    items.sort(key=lambda item: item.path.name != "test_on_pretended_device.py")


def pytest_collection_finish() -> None:
    gc.freeze()  # exclude imported objects from collections


def _seed(request: pytest.FixtureRequest) -> int:
    return zlib.crc32(request.node.name.encode())


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """ "cpu", where kernels are interpreted and every launch is checked, and "cuda"."""
    with sanitize(_seed(request)) if request.param == "cpu" else nullcontext():
        yield request.param


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command of ``fastgpt`` that must fail; return its one-line error."""

    def run(*argv: str, code: int = 2) -> str:
        from fastgpt.__main__ import main

        capsys.readouterr()
        assert main([*argv]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: "), line
        return line

    return run


@pytest.fixture(params=[fused, torch_ops], ids=["fused", "torch_ops"])
def ops(request: pytest.FixtureRequest) -> ModuleType:
    """Implementations that promise the results of ``reference``."""
    return request.param


@pytest.fixture(autouse=True)
def _interpreted(request: pytest.FixtureRequest) -> Iterator[None]:
    """In GPU tests CPU tensors do not go to the Triton kernels, as in a user's process."""
    on_gpu = request.node.get_closest_marker("gpu") is not None
    with _host.interpreted(not on_gpu):
        yield


@pytest.fixture(autouse=True)
def _exact_float32_products() -> None:
    """A trainer enables TF32, as nanoGPT does, for the rest of its process; later tests must not
    inherit it."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """A test draws the same random numbers whatever ran before it."""
    torch.manual_seed(_seed(request))


@pytest.fixture(autouse=True)
def _compiles_afresh() -> None:
    """torch.compile counts recompilations of a function; those of earlier tests must not count."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
