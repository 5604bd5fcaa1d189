"""Ahead-of-time compilation of launches, without a GPU."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.jit import JITFunction

from bench._compile.static import no_gpu_needed
from fastgpt.kernels import _host, compile_ahead, configs, fused
from fastgpt.kernels.configs import Elementwise, Key

CPU = torch.device("cpu")


def test_all_is_compiled_that_can_be_and_nothing_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(configs, "_TUNED", {None: {}})
    run, outputs = JITFunction.run, []

    def gelu(block: int) -> None:
        key = Key("gelu", "fwd", "sm_90", "half")
        configs.use_tuned(CPU, {key: Elementwise(block, 4)})
        outputs.append(fused.gelu(torch.ones(64, dtype=torch.bfloat16)))

    with _host.interpreted(True, 90):
        compile_ahead.compile_ahead([lambda: gelu(512)])
        assert not outputs  # the interpreter compiles nothing
        monkeypatch.setattr(compile_ahead, "_host", SimpleNamespace(INTERPRETED=False))
        with no_gpu_needed(90):
            # 48 does not compile, and 512 appears twice.
            calls = [lambda n=n: gelu(n) for n in (512, 48, 2048, 512)]
            compile_ahead.compile_ahead(calls)
        assert JITFunction.run is run
    assert len(outputs) == 4 and all(y.isnan().all() for y in outputs)
    kernels = [path.name for path in tmp_path.glob("*/*.cubin")]
    assert kernels == ["_gelu_fwd_kernel.cubin"] * 2


def test_launches_are_as_before_if_a_call_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_ahead, "_host", SimpleNamespace(INTERPRETED=False))
    run = JITFunction.run

    def fail() -> None:
        assert JITFunction.run is not run
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_ahead.compile_ahead([fail])
    assert JITFunction.run is run
