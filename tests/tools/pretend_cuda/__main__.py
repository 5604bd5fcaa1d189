"""Command line; see the package's docstring."""

import argparse
import gc
import importlib.machinery
import importlib.util
import runpy
import sys
from pathlib import Path

from tests.tools.pretend_cuda import build

_STATUS_OF_FINDINGS = 70


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.tools.pretend_cuda")
    parser.add_argument("--interpret", action="store_true", help="run every kernel")
    parser.add_argument("-m", dest="module", action="store_true", help="PROGRAM is a module")
    parser.add_argument("program", metavar="PROGRAM")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser.parse_args()


def _load() -> None:
    """Load the extension before anything imports torch."""
    assert "torch" not in sys.modules
    loader = importlib.machinery.ExtensionFileLoader(build.MODULE, str(build.library()))
    spec = importlib.util.spec_from_loader(build.MODULE, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[build.MODULE] = module
    loader.exec_module(module)


def main() -> None:
    arguments = _arguments()
    if reason := build.why_not():
        sys.exit(reason)
    gc.set_threshold(10_000)  # as in the project's conftest
    _load()
    from tests.tools.pretend_cuda import api, device, kernels, operators

    libraries = operators.install()
    api.install()
    kernels.install(arguments.interpret)
    sys.argv = [arguments.program, *arguments.arguments]
    try:
        if arguments.module:
            runpy.run_module(arguments.program, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(arguments.program).parent))
            runpy.run_path(arguments.program, run_name="__main__")
    finally:
        findings = device.end()
        for text in findings:
            print("pretended device:", text, file=sys.stderr)
    del libraries
    if findings:
        sys.exit(_STATUS_OF_FINDINGS)


if __name__ == "__main__":
    main()
