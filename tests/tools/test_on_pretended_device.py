"""Host code for GPUs runs on the pretended device without findings."""

import pytest

from tests.tools.pretend_cuda.process import PROGRAMS, needs_pretended_device, passes

pytestmark = needs_pretended_device


def _programs(*names: str) -> list[str]:
    return [str(PROGRAMS / name) for name in names]


def test_the_device_the_trainer_commands_and_benchmarks() -> None:
    """The device itself, trainer, commands and benchmarks, with filled kernels."""
    passes(*_programs("on_itself.py", "on_trainer.py", "on_commands.py", "on_bench.py"))


def test_a_gpu_without_tritons_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update, a run and benchmarks in float16 on a GPU of compute capability 7.5."""
    monkeypatch.setenv("PRETEND_CAPABILITY", "75")
    ops = [f"on_bench.py::test_ops[{op}]" for op in ("attention_qkvpacked0", "gelu")]
    runs = "on_trainer.py::test_float16[documents]", "on_bench.py::test_run"
    passes(*_programs("on_computed.py::test_doctor", *runs, *ops), interpret=True)


def test_tests_for_a_gpu() -> None:
    """With filled kernels: CUDA graphs change nothing, and there is no hidden synchronisation."""
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


def test_computed() -> None:
    """With interpreted kernels: runs equal those on the CPU. Includes the GPU tests that check
    values: the KV cache, two gradients of one weight, recomputation, benchmarks, a NaN loss."""
    passes(
        *("-m", "gpu", "-k", "not doctor"),
        *_programs("on_computed.py"),
        "tests/bench/test_bench_ops.py",
        "tests/model/test_generation.py::test_cached_logits_are_those_of_the_forward",
        "tests/model/test_model_step.py::test_recomputing_changes_no_bit",
        "tests/model/test_model_step.py::test_the_tied_weight_gets_both_gradients",
        "tests/training/test_trainer.py::test_ignored_targets_change_no_weight",
        interpret=True,
        own=False,
    )
