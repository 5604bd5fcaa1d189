"""The host code for a GPU, executed on the pretended device, which must find nothing."""

import pytest

from tests.tools.pretend_cuda.process import PROGRAMS, needs_pretended_device, passes, start

pytestmark = needs_pretended_device


def test_the_trainer_commands_generation_and_nanogpts_loop() -> None:
    passes(str(PROGRAMS / "on_trainer.py"), str(PROGRAMS / "on_commands.py"))


def test_benchmarks() -> None:
    passes(str(PROGRAMS / "on_bench.py"))


def test_computed_runs() -> None:
    """Every kernel in the interpreter: the numbers are those of the CPU."""
    passes(str(PROGRAMS / "on_computed.py"), interpret=True)


def test_a_gpu_without_tritons_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update, a run and the benchmarks, in float16, on a GPU of compute capability 7.5."""
    monkeypatch.setenv("PRETEND_CAPABILITY", "75")
    run = start("--interpret", "-m", "fastgpt", "doctor")
    assert run.returncode == 0 and "launch table of sm_75" in run.stdout, run.stdout
    assert "one update      agrees with the reference ops" in run.stdout
    passes(
        f"{PROGRAMS / 'on_trainer.py'}::test_float16[documents]",
        f"{PROGRAMS / 'on_bench.py'}::test_run",
        *(f"{PROGRAMS / 'on_bench.py'}::test_ops[{op}]" for op in ("attention_qkvpacked0", "gelu")),
    )


def test_tests_for_a_gpu() -> None:
    """Kernels filled: that a graph changes nothing, that no wait is hidden."""
    passes(
        *("-m", "gpu", "-k", "not ignored_targets"),
        "tests/data/test_batches.py",
        "tests/model/test_generation.py::test_a_captured_step_draws_the_same",
        "tests/model/test_model_documents.py::test_the_host_never_waits",
        "tests/training/test_resume.py",
        "tests/training/test_step.py",
        "tests/training/test_trainer.py",
        own=False,
    )


def test_computed_tests_for_a_gpu() -> None:
    """Those whose numbers count: a cache, two gradients of one weight, recomputing, benchmarks, a
    loss that is NaN."""
    passes(
        *("-m", "gpu"),
        "tests/bench/test_bench_ops.py",
        "tests/model/test_generation.py::test_cached_logits_are_those_of_the_forward",
        "tests/model/test_model_step.py::test_recomputing_changes_no_bit",
        "tests/model/test_model_step.py::test_the_tied_weight_gets_both_gradients",
        "tests/training/test_trainer.py::test_ignored_targets_change_no_weight",
        interpret=True,
        own=False,
    )
