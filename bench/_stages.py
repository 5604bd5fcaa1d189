"""The stages of ``gpu_report.py``, each a program of its own:

    python bench/_stages.py machine FOLDER SECONDS

It leaves what it finds in FOLDER, and SECONDS are what it should plan with.
"""

import functools
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from _visit import Stage, python, read_json, read_json_lines, write_json

# Seconds of a run of run.py on an H200, guessed: a part that does not depend on the batch (above
# all torch.compile), and one for each sequence of the batch.
_FULL_RUN_S = (110.0, 7.5)
_SHORT_RUN = ("--loss_steps=20", "--warmup=10", "--rounds=3", "--steps=10")
_NOT_IN_SHORT_RUNS = ("naive", "huggingface", "fastgpt_recompute", "fastgpt_compile")
_LONG_LOSS = "--loss_steps=200"  # at the smallest batch, where they cost least

REPEATS = 250

# Ragged on purpose: one element more or less than tiles hold.
SMALL_SIZES = {
    "attention_qkvpacked": {"B": 2, "T": 161, "H": 2, "D": 64},
    "embedding": {"B": 2, "T": 33, "C": 96, "V": 65},
    "gelu": {"M": 33, "N": 200},
    "layer_norm": {"M": 37, "C": 200},
    "linear": {"M": 200, "K": 136, "N": 264},
    "linear_cross_entropy": {"M": 33, "C": 64, "V": 1003},
    "mlp": {"M": 200, "C": 72},
    "residual_layer_norm": {"M": 37, "C": 200},
}

# What a GPU kernel's name contains → the kind of work, as in ``_ceilings.floor``; the first that
# fits counts.
_KINDS = {
    "attention": ("attention", "flash", "fmha"),
    "LayerNorm and residual": ("layer_norm", "_sum_bands"),
    "embedding": ("embedding", "radix", "sort", "searchsorted"),
    "loss": ("cross_entropy",),
    "optimizer": ("adam", "multi_tensor", "norm_kernel", "lpnorm"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "splitk", "_linear_", "_weight_grad"),
    "GELU": ("gelu",),
    "casts": ("cast", "amax", "quantise", "transpose"),
    "copies and sums": ("",),
}


# ------------------------------------------------------------------------------- machine, ceilings


def machine(folder: Path, seconds: float) -> int:
    """Facts, and what the machine reaches."""
    import _machine
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_json(folder / "machine.json", {"facts": _machine.facts(device)})
    if device.type == "cpu":
        print("no CUDA GPU")
        return 1
    found = {"facts": _machine.facts(device), "ceilings": _machine.ceilings(device)}
    write_json(folder / "machine.json", found)
    return 0


# ------------------------------------------------------------------------------------------ parity


def _pytest(folder: Path) -> list[str]:
    results = f"--results-to={folder / 'results.jsonl'}"
    return python("-m", "pytest", "-q", "-p", "_visit_plugin", "-p", "no:cacheprovider", results)


def parity_command(folder: Path, seconds: float, workers: int, paths: Iterable[str]) -> list[str]:
    """Every test that needs a GPU. A file that cannot be imported costs its own tests alone."""
    return [
        *_pytest(folder),
        *("-m", "gpu and not slow", "--continue-on-collection-errors", "--tb=short"),
        *("-n", str(workers), f"--maxprocesses={workers}", *paths),
    ]


def parity(folder: Path) -> dict[str, Any]:
    """Counts by op and dtype; the failing tests; those that were begun and not ended."""
    started: list[str] = []
    ended: dict[str, dict[str, Any]] = {}
    for result in read_json_lines(folder / "results.jsonl"):
        test = result["test"]
        if result["outcome"] == "started":
            started.append(test)
        elif ended.get(test, {}).get("outcome") != "failed":  # what failed stays so
            ended[test] = result
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for test, result in ended.items():
        counts[kind_of_test(test)][result["outcome"]] += 1
    return {
        "counts": {kind: dict(count) for kind, count in sorted(counts.items())},
        **{
            outcome: sum(count[outcome] for count in counts.values())
            for outcome in ("passed", "failed", "skipped")
        },
        "failures": [
            {"test": test, "message": result["message"]}
            for test, result in ended.items()
            if result["outcome"] == "failed"
        ],
        "not_ended": [test for test in dict.fromkeys(started) if test not in ended],
    }


def kind_of_test(test: str) -> str:
    """ "tests/test_mlp.py::test_parity[cuda-torch.float16-8]" → "mlp float16"."""
    op = Path(test.partition("::")[0]).stem.removeprefix("test_")
    dtype = re.search(r"bfloat16|float16|float32", test.partition("[")[2])
    return f"{op} {dtype[0]}" if dtype else op


# --------------------------------------------------------------------------------- op benchmarks


def ops_command(folder: Path, seconds: float, paths: Iterable[str] = ("bench",)) -> list[str]:
    return [*_pytest(folder), "-n0", "--continue-on-collection-errors", "--tb=short", *paths]


def ops(folder: Path) -> dict[str, Any]:
    """The rows that were measured, and those that failed."""
    results = read_json_lines(folder / "results.jsonl")
    return {
        "rows": [result["figures"] for result in results if "figures" in result],
        "failures": [
            {"test": result["test"], "message": result["message"]}
            for result in results
            if result["outcome"] == "failed"
        ],
    }


# ------------------------------------------------------------------------------------------- runs


def run(folder: Path, seconds: float, batch_size: int) -> int:
    """run.py in full if there is time, else shorter."""
    import run as bench
    from _training import Options

    fixed, each = _FULL_RUN_S
    arguments = [f"--batch_size={batch_size}", f"--out={folder / 'run'}"]
    if seconds < fixed + each * batch_size:
        variants = [name for name in Options().variants if name not in _NOT_IN_SHORT_RUNS]
        arguments += ["--variants", *variants, *_SHORT_RUN]
    if batch_size == min(BATCHES):
        arguments = [a for a in arguments if not a.startswith("--loss_steps")] + [_LONG_LOSS]
    return bench.main(arguments)


def run_record(folder: Path) -> dict[str, Any] | None:
    return read_json(folder / "run" / "run.json")


# ----------------------------------------------------------------------------------------- profile


def profile(folder: Path, seconds: float, options: Any = None) -> int:
    """A few updates of ``fastgpt train``, and steps of its model in nanoGPT's loop, under PyTorch's
    profiler, by kernel and by kind of work. ``options``: of run.py, if not its own."""
    import _machine
    from _ceilings import Ceilings
    from _training import VARIANTS, Options, Plan, Training, tf32

    from fastgpt.corpus import prepare_builtin

    options = options or Options()
    with tempfile.TemporaryDirectory() as temporary, tf32(True):
        plan = Plan.of(options, prepare_builtin(Path(temporary)).data_dir)
        measured = _machine.ceilings(plan.device)
        ceilings = Ceilings("measured", measured["matmul_tflops"], measured["copy_tb_per_s"])
        floor_ms = floor_by_kind(plan.config, options, ceilings)
        found: dict[str, Any] = {
            "batch_size": options.batch_size,
            "block_size": options.block_size,
            "variants": {},
        }
        for name in ("fastgpt_train", "fastgpt"):
            training = Training(VARIANTS[name], plan)
            step_ms, kernels = _profiled(training, plan.device)
            found["variants"][name] = {"step_ms": step_ms, **by_kind(kernels, floor_ms)}
            write_json(folder / "profile.json", found)
    return 0


def _profiled(training: Any, device: Any, steps: int = 5) -> tuple[float, list[dict[str, Any]]]:
    """Milliseconds of a step without the profiler, which takes time; the kernels of a step."""
    from _timing import Clock, spread, synchronize
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = device.type == "cuda"
    for _ in range(3):
        training.step()
    clock = Clock(device)
    for _ in range(steps):
        clock.mark()
        training.step()
    clock.mark()
    step_ms = spread(clock.durations_ms()).median
    with profiler(activities=[getattr(ProfilerActivity, "CUDA" if on_gpu else "CPU")]) as found:
        for _ in range(steps):
            training.step()
        synchronize(device)
    return step_ms, [
        {
            "name": event.key,
            "calls": event.count / steps,
            "ms": (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
            / steps
            / 1e3,
        }
        for event in found.key_averages()
        if not on_gpu or event.device_type == DeviceType.CUDA
    ]


def floor_by_kind(config: Any, options: Any, ceilings: Any) -> dict[str, float]:
    """Milliseconds of a step: forward and backward as in ``_ceilings``, and AdamW, which moves 28
    bytes a float32 parameter."""
    import torch
    from _ceilings import floor

    from fastgpt import GPT

    with torch.device("meta"):
        n_parameters = GPT(config).get_num_params(non_embedding=False)
    found: defaultdict[str, float] = defaultdict(float)
    for row in floor(config, options.batch_size, options.block_size, ceilings):
        found[row.kind] += row.ms
    found["optimizer"] = ceilings.ms(0, 28 * n_parameters, True)
    return dict(found)


def kind_of_kernel(name: str) -> str:
    name = name.lower()
    return next(kind for kind, parts in _KINDS.items() if any(part in name for part in parts))


def by_kind(kernels: list[dict[str, Any]], floor_ms: dict[str, float]) -> dict[str, Any]:
    """Share of the kernels' time, the floor and the ratio for each kind; the kernels themselves,
    the slowest first. The floor counts the logits' rows among the matrix products."""
    total = sum(kernel["ms"] for kernel in kernels)
    sums: defaultdict[str, float] = defaultdict(float)
    for kernel in kernels:
        kernel["kind"] = kind_of_kernel(kernel["name"])
        kernel["share"] = kernel["ms"] / total if total else 0.0
        sums[kernel["kind"]] += kernel["ms"]
    kinds = [
        {
            "kind": kind,
            "ms": sums.get(kind, 0.0),
            "share": sums.get(kind, 0.0) / total if total else 0.0,
            "floor_ms": floor_ms.get(kind),
            "ratio": sums.get(kind, 0.0) / floor_ms[kind] if floor_ms.get(kind) else None,
        }
        for kind in dict.fromkeys((*sums, *floor_ms))
    ]
    return {
        "kernels_ms": total,
        "floor_ms": sum(floor_ms.values()),
        "kinds": sorted(kinds, key=lambda row: -row["ms"]),
        "kernels": sorted(kernels, key=lambda kernel: -kernel["ms"])[:40],
    }


# ------------------------------------------------------------------------------- determinism, small


def _benchmarks() -> dict[str, Any]:
    import bench_attention
    import bench_embedding
    import bench_gelu
    import bench_layer_norm
    import bench_linear
    import bench_linear_cross_entropy
    import bench_mlp
    import bench_residual_layer_norm

    files = (
        bench_attention,
        bench_embedding,
        bench_gelu,
        bench_layer_norm,
        bench_linear,
        bench_linear_cross_entropy,
        bench_mlp,
        bench_residual_layer_norm,
    )
    return {file.OP.name: file.OP for file in files}


def _once(op: Any, sizes: dict[str, int]) -> Callable[[], list[Any]]:
    """Forward and backward of ours on the same random inputs; outputs and gradients."""
    import torch
    from _op_bench import DEVICE, DTYPE, Draw, gradients_like, tensors, wants_gradient

    torch.manual_seed(0)
    inputs = op.inputs(Draw(DEVICE, DTYPE), **sizes)
    function = op.function("fused")
    leaves = [x for x in inputs if wants_gradient(x)]
    out_grads = gradients_like(function(*inputs))

    def once() -> list[Any]:
        outputs = tensors(function(*inputs))
        return [*outputs, *torch.autograd.grad(outputs, leaves, out_grads)]

    return once


def determinism(
    folder: Path,
    seconds: float,
    repeats: int = REPEATS,
    sizes: dict[str, dict[str, int]] | None = None,
) -> int:
    """Every op again and again, equal to the bit? First the size that GPT-2 trains with."""
    import torch

    found: dict[str, Any] = {}
    for name, op in _benchmarks().items():
        start = time.monotonic()
        once = _once(op, dict(op.gpu_sizes[0]) if sizes is None else sizes[name])
        first = once()
        different = sum(
            not all(torch.equal(a, b) for a, b in zip(once(), first, strict=True))
            for _ in range(repeats - 1)
        )
        found[name] = {
            "repeats": repeats,
            "different": different,
            "seconds": round(time.monotonic() - start, 1),
        }
        print(name, found[name])
        write_json(folder / "determinism.json", found)
    return int(any(one["different"] for one in found.values()))


def small(folder: Path, seconds: float, sizes: dict[str, dict[str, int]] = SMALL_SIZES) -> int:
    """Every op once on small shapes, for compute-sanitizer to look at."""
    from _timing import synchronize

    for name, op in _benchmarks().items():
        print(f"op: {name}", flush=True)
        for result in _once(op, sizes[name])():
            synchronize(result.device)
    return 0


def sanitizer_command(folder: Path, seconds: float, tool: str) -> list[str]:
    """PyTorch's allocator hands out parts of large blocks, past whose ends nobody would notice."""
    return [
        *("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool),
        *("--error-exitcode", "9", "--log-file", str(folder / "sanitizer.txt")),
        *python(Path(__file__).resolve(), "small", folder, seconds),
    ]


def sanitizer(folder: Path) -> dict[str, Any]:
    """What the tool says, the errors first."""
    path = folder / "sanitizer.txt"
    text = path.read_text(errors="replace") if path.is_file() else ""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    output = folder / "output.txt"
    ran = re.findall(r"^op: (\w+)", output.read_text(errors="replace"), re.M)
    return {"summary": summary[-1] if summary else None, "ops": ran, "log": text.splitlines()[:60]}


# -------------------------------------------------------------------------------------- all of them

BATCHES = (32, 64, 4)


def plan(sweeps: tuple[str, ...], workers: int, has_sanitizer: bool) -> list[Stage]:
    """All stages in the order of worth."""
    this = Path(__file__).resolve()

    def own(name: str) -> Callable[[Path, float], list[str]]:
        return lambda folder, seconds: python(this, name, folder, seconds)

    def json_of(name: str) -> Callable[[Path], Any]:
        return lambda folder: read_json(folder / name)

    no_sanitizer = None if has_sanitizer else "compute-sanitizer is not on the PATH"
    return [
        Stage("machine", own("machine"), json_of("machine.json"), 15, 30),
        Stage(
            "parity",
            functools.partial(parity_command, workers=workers, paths=("tests",)),
            parity,
            130,
            30,
        ),
        Stage("ops", ops_command, ops, 100, 30),
        *(
            Stage(f"run-b{batch}", own(f"run-b{batch}"), run_record, weight, 45, patience=1.6)
            for batch, weight in zip(BATCHES, (110, 150, 90), strict=True)
        ),
        Stage("profile", own("profile"), json_of("profile.json"), 25, 15),
        Stage(
            "sweep",
            lambda folder, seconds: python(
                *(this.with_name("sweep.py"), *sweeps, f"--json={folder / 'sweep.json'}"),
                f"--minutes={seconds / 60}",
            ),
            json_of("sweep.json"),
            120,
            30,
            skip=None if sweeps else "no op was named (--sweep)",
        ),
        Stage("determinism", own("determinism"), json_of("determinism.json"), 25, 15),
        *(
            Stage(
                tool,
                functools.partial(sanitizer_command, tool=tool),
                sanitizer,
                30,
                20,
                patience=1.5,
                skip=no_sanitizer,
            )
            for tool in ("memcheck", "racecheck")
        ),
        Stage("machine-after", own("machine"), json_of("machine.json"), 12, 8),
    ]


PROGRAMS: dict[str, Callable[[Path, float], int]] = {
    "machine": machine,
    "profile": profile,
    "determinism": determinism,
    "small": small,
    **{f"run-b{batch}": functools.partial(run, batch_size=batch) for batch in BATCHES},
}

if __name__ == "__main__":
    program, folder, seconds = sys.argv[1:]
    sys.exit(PROGRAMS[program](Path(folder), float(seconds)))
