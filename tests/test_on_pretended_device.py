"""The project's host code for a GPU, executed on the pretended device; its findings must be none."""

import pytest
from tools.pretend_cuda.process import PROGRAMS, needs_pretended_device, passes

pytestmark = needs_pretended_device


@pytest.mark.parametrize("which", ["graph", "float16 or stop or bigram"])
def test_runs_of_the_trainer(which: str) -> None:
    passes(str(PROGRAMS / "on_trainer.py"), "-k", which)


def test_commands_generation_and_nanogpts_loop() -> None:
    passes(str(PROGRAMS / "on_commands.py"))


def test_benchmarks() -> None:
    passes(str(PROGRAMS / "on_bench.py"))


def test_computed_runs() -> None:
    """Every kernel in the interpreter: the numbers are those of the CPU."""
    passes(str(PROGRAMS / "on_computed.py"), interpret=True)


SUITE = {
    "step": ["tests/test_step.py", "tests/test_resume.py", "tests/test_trainer.py"],
    "data": ["tests/test_data.py", "tests/test_model_documents.py"],
    "generation": ["tests/test_generation.py"],
}


@pytest.mark.parametrize("files", SUITE.values(), ids=SUITE)
def test_tests_for_a_gpu(files: list[str]) -> None:
    passes("-m", "gpu", *files, interpret=True, own=False)
