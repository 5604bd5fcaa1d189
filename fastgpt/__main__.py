"""The entry point of the command line. Reports a missing package in one line."""

import sys


def main(argv: list[str] | None = None) -> int:
    """See ``fastgpt.cli.main.main``; returns 2 if tyro or rich is not installed."""
    try:
        from fastgpt.cli import main
    except ModuleNotFoundError as error:
        if error.name not in ("tyro", "rich"):
            raise
        lacking = f"the command line needs {error.name}: pip install {error.name}"
        print(f"error: {lacking}", file=sys.stderr)
        return 2
    return main.main(argv)


if __name__ == "__main__":
    sys.exit(main())
