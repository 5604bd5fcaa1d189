"""bench/sweep.py: what is tried, what is rejected, which configuration wins, how it is printed."""

import ctypes
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from bench import sweep
from bench._compile.static import recorded
from bench._ops.op_bench import Case
from bench.sweep import Made, Request, Subject
from fastgpt.kernels import configs
from fastgpt.kernels.configs import ANY, CUBLAS, Attention, Elementwise, Gemm

BF16 = torch.bfloat16


def subject(op: str, size: int | str, benchmark: str, direction: Any, **sizes: int) -> Subject:
    return Subject(Request(op, "fwd", 90, BF16, size, ()), benchmark, BF16, direction, [sizes])


GELU = subject("gelu", ANY, "gelu.OP", "forward", M=64, N=64)
ATTENTION = subject("attention", 64, "attention.OP", "forward", B=1, T=128, H=2, D=64)
FC = subject("gemm", ANY, "mlp.FC", "inference", M=64, C=64)


@pytest.mark.parametrize("name", sweep.BENCHMARKS)
def test_candidates_reach_the_launches_and_the_table(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = sweep.subjects(name, 90, BF16)

    def launched(subject: Subject, config: Any) -> list[dict[str, Any]]:
        op = sweep.op_of(subject.benchmark, BF16)
        with recorded(90) as launches, sweep.using(subject.request, config):
            sweep.work_of(op, subject.direction, subject.sizes[0])()
        return [
            {k: v for k, v in one.options.items() if k.isupper() or "num" in k} for one in launches
        ]

    for subject in subjects[:6]:
        present, *others = subject.candidates
        assert len(set(others)) == len(others) >= 3 and present not in others
        assert launched(subject, others[0]) != launched(subject, present), subject.request
        # the printed line, pasted
        line = eval(f"{{{subject.request.line(others[0])}}}", dict(vars(configs)))
        monkeypatch.setattr(configs, "TABLE", configs.TABLE | line)
        configs.lookup.cache_clear()
        assert configs.lookup(*subject.request) == others[0]
        monkeypatch.undo()
        configs.lookup.cache_clear()
        assert configs.lookup(*subject.request) == present


def test_every_line_of_the_table_has_a_benchmark() -> None:
    assert {key.op for key in configs.TABLE} == set(sweep.BENCHMARKS)


def test_what_the_compiler_makes_of_a_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(subject: Subject, config: Any) -> Made:
        return sweep.compiled(subject, config, keep=False)

    good = made(ATTENTION, Attention(64, 64, 4, 2, True))
    assert good.fault is None and good.programs >= 1 and good.registers > 128
    limited = made(ATTENTION, Attention(64, 64, 4, 2, True, 128))
    assert limited.registers == 128 and "spills" in str(limited.fault)
    assert str(made(ATTENTION, Attention(48, 64, 4, 2)).fault).startswith("does not compile")
    assert made(FC, Gemm(128, 64, 64, 8, 3, 1)).programs == 2
    assert made(FC, CUBLAS) == Made(None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # what the timing process finds
    sweep.compiled(GELU, Elementwise(512, 2), keep=True)
    assert [path.name for path in tmp_path.glob("*/*.cubin")] == ["_gelu_fwd_kernel.cubin"]


class Crash:
    def __reduce__(self) -> Any:
        return ctypes.string_at, (0,)  # ends the process that unpickles it


@pytest.mark.slow
def test_a_candidate_that_crashes_the_compiler_is_rejected_alone() -> None:
    made = sweep.compile_all(GELU, [Crash(), CUBLAS], jobs=1, keep=False)
    assert made == [Made("crashes the compiler"), Made(None)]


def test_wrong_candidates_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted; the times are the order of the calls."""
    request = Request("gelu", "fwd", cast(Any, None), torch.float32, ANY, ())
    subject = replace(GELU, request=request, dtype=torch.float32, sizes=[{"M": 5, "N": 70}] * 2)
    check, shown, ticks = Case.check, cast(list[str], []), itertools.count(1.0)

    def checked(case: Case, *args: Any) -> None:
        check(case, *args)
        assert configs.lookup(*request) != Elementwise(256, 4), "an element differs"

    monkeypatch.setattr(Case, "check", checked)
    monkeypatch.setattr(sweep.Stopwatch, "time", lambda self, work: self.ms.append(next(ticks)))
    candidates = [Elementwise(1024, 4), Elementwise(256, 4), Elementwise(512, 2)]
    ms = sweep.timed(subject, candidates, shown.append)
    assert {number: len(times) for number, times in ms.items()} == {-1: 2, 0: 2, 2: 2}
    assert shown == [f"{candidates[1]} is wrong: AssertionError: an element differs"]


@pytest.mark.parametrize(
    ("again", "other", "best"),
    [
        ([1.0, 2.0], [0.9, 1.0], 1),  # a size where it gains little and one where it gains much
        ([1.0, 2.0], [0.5, 4.1], 0),  # the geometric mean over the sizes
        ([1.0, 2.0], [0.995, 1.99], 0),  # less than 1%
        ([1.2, 2.4], [0.9, 1.8], 0),  # less than the noise
        ([0.8, 1.6], [0.9, 1.8], 0),
    ],
)
def test_who_wins(again: list[float], other: list[float], best: int) -> None:
    found, gain, noise = sweep.verdict({-1: again, 0: [1.0, 2.0], 1: other})
    assert found == best and gain >= 1.0 and noise >= 1.0


def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")

    def compile_some(subject: Subject, candidates: list[Any], jobs: int, keep: bool) -> list[Made]:
        assert (jobs, keep, subject.request.capability) == (3, False, 100)
        if subject.request.kernel == "bwd":
            raise RuntimeError("no compiler")
        return [Made(None, 40, 2048, 4), *[Made("spills 8 bytes")] * (len(candidates) - 1)]

    monkeypatch.setattr(sweep, "compile_all", compile_some)
    assert sweep.main(["gelu", "--arch=100", "--jobs=3"]) == 1
    printed = capsys.readouterr().out
    assert "nothing is timed" in printed and "8 of 9 rejected" in printed
    assert "Elementwise(BLOCK=1024, num_warps=4): 40 registers, 2 KB shared, 4/SM" in printed
    assert "gelu bwd: RuntimeError: no compiler" in printed
    assert sweep.main(["gelu", "--only=dq"]) == 2
    assert (
        "--only must match a configuration, got 'dq'; there are: gelu fwd"
        in capsys.readouterr().err
    )
    for wrong in (["softmax"], ["gelu", "--jobs=0"]):
        with pytest.raises(SystemExit):
            sweep.main(wrong)
