"""Compiles what some calls of the ops would launch, side by side: Triton releases Python's lock
while it compiles."""

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
def _noted() -> Iterator[list[Launch]]:
    """Within, a launch is noted in the list in place of made."""
    launches: list[Launch] = []

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append((kernel, args, options))

    run = JITFunction.run
    JITFunction.run = note  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.run = run  # type: ignore[method-assign]


def compile_ahead(calls: Iterable[Callable[[], Any]]) -> None:
    """Compile what ``calls`` launch, and launch none of it: what they compute is not to be used.
    What does not compile is left out: it fails again where it is launched. Nothing is compiled in
    the interpreter."""
    calls = list(calls)
    if _host.INTERPRETED:
        return
    with _noted() as launches:
        for call in calls:
            call()
    n_threads = min(_MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(n_threads) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for kernel, args, options in launches:
            with suppress(Exception):
                kernel.warmup(*args, grid=(1,), **options)
