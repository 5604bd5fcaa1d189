"""Compiles the kernels that given calls would launch, in parallel: Triton releases the GIL while it
compiles."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

from triton import AsyncCompileMode
from triton.runtime.jit import JITFunction

from fastgpt.kernels import _host

_MOST_THREADS = 16
Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]


@contextmanager
def _recorded() -> Iterator[list[Launch]]:
    """Context in which launches are recorded in the list instead of executed."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append((kernel, args, options))

    run = JITFunction.run
    JITFunction.run = record  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.run = run  # type: ignore[method-assign]


def compile_ahead(calls: Iterable[Callable[[], Any]]) -> None:
    """Compile the kernels that ``calls`` would launch, without launching them. The calls' results
    are meaningless. Compilation errors are ignored here, since the real launch raises them again.
    Does nothing in the interpreter."""
    calls = list(calls)
    if _host.INTERPRETED:
        return
    with _recorded() as launches:
        for call in calls:
            call()
    n_threads = min(_MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(n_threads) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for kernel, args, options in launches:
            with suppress(Exception):
                kernel.warmup(*args, grid=(1,), **options)
