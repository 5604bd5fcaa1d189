"""bench/sweep.py: what is tried, what is rejected, which line wins, and how it is printed."""

import ctypes
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bench import sweep
from bench._compile.static import recorded
from bench._roofline.ceilings import Ceilings
from bench._sweep.compile import Static, Task, compile_all, compiled, fitted
from bench._sweep.contest import (
    ROUNDS,
    Contest,
    comment,
    contest,
    difference,
    measured,
    verdict,
    wrong,
)
from bench._sweep.line import Call, Line, Sizes, Tile
from bench._sweep.tables import OPS, lines

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CEILINGS = Ceilings("a GPU", 500.0, 4.0)

EVERY_LINE = [
    pytest.param(capability, op, name, id=f"{capability}-{name}")
    for capability in (80, 90, 100)
    for op in OPS
    for name in lines(op, capability, torch.bfloat16)
]


# -- the lines


@pytest.mark.parametrize(("capability", "op", "name"), EVERY_LINE)
def test_a_candidate_stands_in_the_table_for_the_time_of_a_call(
    capability: int, op: str, name: str
) -> None:
    line = lines(op, capability, torch.bfloat16)[name]
    assert line.current not in line.candidates
    assert len(set(line.candidates)) == len(line.candidates) > 5

    def launched(tile: Tile) -> list[dict[str, Any]]:
        with line.put(tile), recorded(capability) as launches:
            line.call(CPU, torch.bfloat16, line.probe).run()
        own = [launch for launch in launches if launch.kernel.__name__ in line.kernels]
        return [dict(launch.options) for launch in own]

    before = launched(line.current)
    assert before
    tried = [launched(tile) for tile in line.candidates[:12] if tile is not None]
    assert any(options != before for options in tried)
    assert launched(line.current) == before
    with recorded(capability) as launches:  # the table as it stands
        line.call(CPU, torch.bfloat16, line.probe).run()
    own = [launch for launch in launches if launch.kernel.__name__ in line.kernels]
    assert [dict(launch.options) for launch in own] == before


@pytest.mark.parametrize(("capability", "op", "name"), EVERY_LINE)
def test_a_line_is_printed_as_it_stands_in_the_source(capability: int, op: str, name: str) -> None:
    line = lines(op, capability, torch.bfloat16)[name]
    text = line.text(line.current).partition("  #")[0]
    found = [path.name for path in (ROOT / "kernels").glob("*.py") if text in path.read_text()]
    assert found, text


def test_cublas_is_a_candidate_for_products_and_float32_products_have_no_line() -> None:
    for line in lines("gemm", 90, torch.bfloat16).values():
        assert None in line.candidates
        with line.put(None), recorded(90) as launches:
            line.call(CPU, torch.bfloat16, line.probe).run()
        assert not {launch.kernel.__name__ for launch in launches} & set(line.kernels)
    assert lines("gemm", 90, torch.float32) == {}


# -- compilation


def test_what_the_compiler_makes_of_a_candidate() -> None:
    def of(tile: Tile, line: str = "attention fwd, head size 64", op: str = "attention") -> Static:
        return compiled(Task(op, line, tile, 90, torch.bfloat16))

    good = of((64, 64, 4, 2, 0))
    assert good.fault is None and good.programs >= 1 and good.registers > 128
    limited = of((64, 64, 4, 2, 128))
    assert limited.fault is not None and "spills" in limited.fault
    assert limited.registers == 128
    broken = of((48, 64, 4, 2, 0))
    assert broken.fault is not None and broken.fault.startswith("does not compile")
    line = lines("gemm", 90, torch.bfloat16)["gemm fwd"]
    product = of((128, 64, 64, 8, 3, 1), "gemm fwd", "gemm")
    assert product.fault is None and product.programs == 2
    assert fitted(line, (128, 64, 64, 8, 3, 1), product) == (128, 64, 64, 8, 3, 2)
    assert fitted(line, None, Static(None)) is None
    assert of(None, "gemm fwd", "gemm") == Static(None)


def test_the_process_that_times_finds_what_was_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    task = Task("gelu", "gelu fwd", (512, 2), 90, torch.bfloat16)
    assert compiled(task).fault is None and not any(tmp_path.iterdir())
    assert compiled(replace(task, keep=True)).fault is None
    assert [path.name for path in tmp_path.glob("*/*.cubin")] == ["_gelu_fwd_kernel.cubin"]


def test_a_candidate_that_crashes_the_compiler_is_rejected_alone() -> None:
    tasks = cast(Any, [b"one", 0, b"two"])  # 0: reading from that address ends the process
    found = compile_all(tasks, jobs=2, work=cast(Any, ctypes.string_at))
    assert found == [b"one", Static("crashes the compiler"), b"two"]


# -- comparing


def test_one_wrong_element_is_found_and_rounding_is_not() -> None:
    right = torch.randn(64, 128)
    rounded = right.bfloat16()
    other = (right * (1 + torch.randn_like(right) * 2**-10)).bfloat16()
    assert not torch.equal(rounded, other)
    assert difference([other], [rounded], torch.bfloat16) is None
    for value in (1.5, float("nan")):
        spoiled = rounded.clone()
        spoiled[13, 7] += value
        found = difference([rounded, spoiled], [rounded, rounded], torch.bfloat16)
        assert found == "result 1 differs in 1 of 8192 elements"
    assert difference([rounded], [], torch.bfloat16) == "1 results, not 0"
    assert difference([right], [rounded], torch.bfloat16) == "result 0 is (64, 128) torch.float32"
    assert difference([torch.ones(())], [torch.ones(())], torch.bfloat16) is None


# -- timing


class Table:
    """A launch table of one line, an op that reads it, and a clock that knows how long each tile
    takes."""

    def __init__(self, ms: dict[Tile, float]) -> None:
        self.says: Tile = (1,)
        self.ms = ms
        self.timed: list[Tile] = []
        self.line = Line(
            name="toy",
            current=(1,),
            candidates=tuple(tile for tile in ms if tile != (1,)),
            put=self.put,
            call=self.call,
            sizes=({"N": 1}, {"N": 2}),
            probe={"N": 1},
            kernels=(),
            text=lambda tile: f'"toy": {tile},',
        )

    @contextmanager
    def put(self, tile: Tile) -> Iterator[None]:
        before, self.says = self.says, tile
        yield
        self.says = before

    def call(self, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Call:
        x = torch.randn(8)

        def run() -> Sequence[Tensor]:
            return [x + 1.0 if self.says == (13,) and sizes["N"] == 2 else x]

        return Call(run, flops=10**9 * sizes["N"], bytes=10**6)

    def timer(self, call: Call) -> float:
        self.timed.append(self.says)
        return self.ms[self.says] * call.flops / 1e9

    def result(self) -> dict[str, Any]:
        contests, rejected = measured(
            self.line, self.line.candidates, CPU, torch.float32, self.timer, lambda text: None
        )
        found = verdict(self.line, contests, CEILINGS, half=True)
        return found | {"rejected": rejected}


def test_the_fastest_right_candidate_wins_and_a_wrong_one_is_rejected() -> None:
    table = Table({(1,): 1.0, (2,): 0.8, (3,): 0.7, (13,): 0.1, (4,): 5.0, None: 0.9})
    found = table.result()
    assert found["best"] == (3,) and found["gain"] == pytest.approx(1 / 0.7)
    assert found["line"] == '"toy": (3,),'
    assert found["noise"] == 0.0
    assert found["rejected"] == {(13,): "result 0 differs in 8 of 8 elements at N2"}
    assert [tile for tile, _ in found["scores"]] == [(3,), (2,), None, (1,), (4,)]
    assert table.timed.count((4,)) == 2 * ROUNDS[0]  # too slow for the second part
    assert table.timed.count((3,)) == 2 * sum(ROUNDS)
    assert table.timed.count((1,)) == 2 * 2 * sum(ROUNDS)  # and once more for the noise
    assert [row["ms"] for row in found["sizes"]] == pytest.approx([0.7, 1.4])
    first = found["sizes"][0]
    assert first["tflop_per_s"] == pytest.approx(1 / 0.7)
    assert first["share_of_ceiling"] == pytest.approx(1e9 / 500.0 / 1e9 / 0.7)
    assert table.says == (1,)
    text = comment(found, "NVIDIA H200", torch.bfloat16)
    assert "NVIDIA H200, bfloat16: 0.7 ms at N1" in text
    assert "1.43x of (1,) over 2 sizes" in text.replace("\n# ", " ")
    assert all(row.startswith("# ") and len(row) <= 98 for row in text.splitlines())


def test_a_gain_within_the_noise_changes_nothing() -> None:
    slower_again = itertools.cycle([1.0, 1.1])

    class Noisy(Table):
        def timer(self, call: Call) -> float:
            ms = super().timer(call)
            return next(slower_again) if self.says == (1,) else ms

    found = Noisy({(1,): 0.0, (2,): 1.0}).result()
    assert found["noise"] > 0.01
    still = Table({(1,): 1.0, (2,): 0.995}).result()
    assert still["best"] == (1,) and still["gain"] == 1.0
    assert "none of 1 others is faster" in comment(still, "a GPU", torch.bfloat16)


def test_a_line_serves_all_its_sizes() -> None:
    line = Table({(1,): 1.0, (2,): 1.0, (3,): 1.0}).line
    contests = [
        Contest({"N": 1}, 1.0, 1.0, {(2,): 0.5, (3,): 0.8}, 0, 10**9),
        Contest({"N": 2}, 1.0, 1.0, {(2,): 3.0, (3,): 0.8}, 0, 10**9),
    ]
    found = verdict(line, contests, CEILINGS, half=True)
    assert found["best"] == (3,) and found["gain"] == pytest.approx(1.25)
    assert [row["own_best"] for row in found["sizes"]] == [(2,), (3,)]
    text = comment(found, "a GPU", torch.bfloat16).replace("\n# ", " ")
    assert "(faster at one size: (2,) 1.60x at N1)" in text
    noisy = [replace(one, again_ms=1.3) for one in contests]
    assert verdict(line, noisy, CEILINGS, half=True)["best"] == (1,)


@pytest.mark.parametrize(
    ("op", "name", "sizes", "tiles"),
    [
        (
            "attention",
            "attention dkdv, head size 64",
            {"B": 1, "T": 70, "H": 1, "D": 64},
            [(32, 32, 4, 1), (16, 64, 4, 1)],
        ),
        ("gemm", "gemm bwd", {"M": 40, "K": 32, "N": 48}, [(32, 32, 32, 4, 1, 1), None]),
        ("gemm", "gemm weight", {"T": 300, "M": 32, "N": 48}, [(32, 32, 32, 4, 1, 1), None]),
        ("layer_norm", "layer_norm bwd", {"M": 9, "C": 40}, [(512, 2, 256)]),
        ("cross_entropy", "cross_entropy rows", {"M": 3, "V": 65}, [(512, 128)]),
        ("gelu", "gelu bwd", {"M": 5, "N": 70}, [(256, 4)]),
        ("embedding", "embedding fwd", {"B": 2, "T": 5, "C": 40, "V": 9}, [(4, 32, 4)]),
        ("embedding", "embedding bwd token", {"B": 2, "T": 70, "C": 40, "V": 3}, [(512, 64, 4)]),
        ("adamw", "adamw", {"N": 700}, [(256, 2)]),
    ],
)
def test_candidates_of_the_kernels_are_right(
    op: str, name: str, sizes: dict[str, int], tiles: list[Tile]
) -> None:
    """Interpreted: the host functions are run with each candidate, and compared."""
    line = lines(op, None, torch.float32)[name]
    ticks = itertools.count(1.0)
    assert wrong(replace(line, sizes=(sizes,)), tiles, CPU, torch.float32) == {}
    found = contest(line, tiles, sizes, CPU, torch.float32, lambda call: next(ticks))
    assert set(found.ms) == set(tiles)


# -- the command line


def test_without_a_gpu_it_compiles_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")

    def compile_some(tasks: Sequence[Task], jobs: int) -> list[Static]:
        assert jobs == 3 and {task.capability for task in tasks} == {100}
        faults = [None, *["spills 8 bytes"] * (len(tasks) - 1)]
        return [Static(fault, 40, 2048, 4) for fault in faults]

    monkeypatch.setattr(sweep, "compile_all", compile_some)
    out = tmp_path / "sweep.json"
    arguments = ["gelu", "--only", "*fwd", "--arch=100", "--jobs=3", f"--json={out}"]
    assert sweep.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "nothing is timed" in printed and "_LAUNCH = dict(BLOCK=1024, num_warps=4)" in printed
    (record,) = json.loads(out.read_text())
    assert record["name"] == "gelu fwd" and record["measured"] is None
    assert f"{len(record['static']) - 1} of {len(record['static'])} rejected" in printed


def test_a_line_that_fails_costs_itself_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept: list[str] = []

    def sweep_line(op: str, line: Line, *rest: Any) -> dict[str, Any]:
        swept.append(line.name)
        if len(swept) == 1:
            raise RuntimeError("illegal access\nand more")
        if len(swept) == 3:
            raise KeyboardInterrupt
        return {"op": op, "name": line.name, "measured": None}

    monkeypatch.setattr(sweep, "sweep_line", sweep_line)
    out = tmp_path / "sweep.json"
    assert sweep.main(["gelu", "adamw", "layer_norm", f"--json={out}"]) == 130
    records = json.loads(out.read_text())
    assert [record["name"] for record in records] == swept[:2]
    assert records[0]["failure"] == "RuntimeError: illegal access" and "failure" not in records[1]
    captured = capsys.readouterr()
    assert "and more" in captured.err and f"interrupted in {swept[2]}" in captured.err
    swept.clear()
    assert sweep.main(["gelu", "--only=*fwd"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gelu", "--only=dq"], "--only must match a line, got 'dq'"),
        (["gemm", "--dtype=float32"], "in float32 there are: none"),
        (["softmax"], "invalid choice: 'softmax'"),
        (["gelu", "--jobs=0"], "--jobs must be at least 1, got 0"),
        (["gelu", "--minutes=0"], "--minutes must be positive, got 0"),
        (["gelu", "--json=no/such/a.json"], "--json must be a file in a folder that is there, got"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert sweep.main(arguments) == 2
    except SystemExit as error:  # argparse
        assert error.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_sweep_on_the_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep.json"
    assert sweep.main(["gelu", "--only=gelu fwd", "--jobs=2", f"--json={out}"]) == 0
    (record,) = json.loads(out.read_text())
    assert record["measured"]["line"] in capsys.readouterr().out
    assert record["rejected"] == []
    assert 0.0 < record["measured"]["sizes"][0]["share_of_ceiling"] < 1.2
