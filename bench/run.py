"""Tokens per second of GPT training: this library against PyTorch, in one process.

    python bench/run.py                             # GPT-2 124M on a GPU, a small size on a CPU
    python bench/run.py --quick                     # four variants, few steps: under 100 s
    python bench/run.py --batch_size=8 --variants fastgpt sdpa_compile
    python bench/run.py --out bench/results/h200    # for bench/publish.py

All variants start from the same weights and train on the same batches of real text. naive and sdpa
are nanoGPT's step as its users run it: all logits, PyTorch's cross-entropy, AdamW, fused on CUDA.
sdpa_liger, if Liger-Kernel is installed, is sdpa with its LayerNorm, and with its fused head and
loss. fastgpt is nanoGPT's step with ``fastgpt.GPT``. fastgpt_train is the update of
``fastgpt train``: bfloat16 weights with float32 master weights, as one CUDA graph; in float16, it
uses autocast and the gradient scaler, without a graph. fp8 changes the results, so its variant is
measured only if named. One step is: the next batch from host to device, forward, backward, gradient
clipping, AdamW. The host does not read the loss.

1. float32 reference, with up to four sequences or ``--reference=True``: ``loss_steps`` steps of
   nanoGPT's model, eager and with masked matmul attention, in float32, four sequences at a time.
   Only its losses are used.
2. Each variant alone on the device: the time to its first step, ``loss_steps`` losses, and the peak
   of allocated memory over these steps except the first.
3. All variants side by side: rebuilt, warmed up for ``warmup`` steps, then ``rounds`` rounds in
   which each variant takes a turn of two untimed and ``steps`` timed steps. Variants that do not
   fit into GPU memory together, judging by the peaks of step 2, are measured in groups, one after
   the other. One variant, the base, is in every group, and variants of different groups are
   compared by their speeds relative to the base of their own group.

run-b<batch size>.json is rewritten after every variant and every turn. ``complete`` is false in it
until the end, so an interrupted run keeps its measurements. An error ends only the variant that
raised it.

The time to the first step includes building the model, moving it to the device, compiling, and the
step. Cold: dynamo is reset, and the caches of torch.compile and Triton are empty; on a GPU,
torch.compile itself is already loaded. Kernels compiled by an earlier variant stay loaded in the
process, so only the first fastgpt variant compiles. Warm: the second time, with filled caches.
Neither includes starting Python and importing torch.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

if __name__ == "__main__":  # Python looks for modules in the folder of the script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._harness import cli, machine
from bench._step import pictures, report
from bench._step.measurement import Measurement, unsupported
from bench._step.variants import QUICK, VARIANTS, Plan, default_options
from fastgpt import GPT, devices
from fastgpt.data.batches import token_files
from fastgpt.data.builtin_texts import prepare_builtin

_PROTOCOL = {"loss_steps": 100, "warmup": 20, "rounds": 5, "steps": 20}  # at least


def _notes(plan: Plan) -> list[str]:
    """How this run differs from the protocol."""
    notes = []
    if plan.device.type == "cpu":
        notes.append(f"{report.CPU_NOTE}: fastgpt runs PyTorch's own ops there")
    elif not devices.triton_refusal(plan.device):
        from fastgpt.kernels import configs  # needs Triton

        n_tuned = len(configs.tuned(plan.device))
        if n_tuned:
            notes.append(f"fastgpt takes {n_tuned} launches from a table of 'fastgpt tune'")
    few = {key: n for key in _PROTOCOL if (n := getattr(plan.options, key)) < _PROTOCOL[key]}
    if few:
        given = ", ".join(f"{key}={n}" for key, n in few.items())
        least = ", ".join(str(_PROTOCOL[key]) for key in few)
        notes.append(f"Short run: {given}; protocol: at least {least}")
    return notes


def _facts(plan: Plan) -> dict[str, Any]:
    """The parts of the record that are known before measuring: machine, options, data."""
    o = plan.options
    with torch.device("meta"):
        parameters = GPT(plan.config).get_num_params()
    sdpa = None
    if plan.device.type == "cuda":
        sizes = o.batch_size, o.block_size, o.n_head, o.n_embd
        sdpa = {"operator": machine.sdpa_operator(plan.device, plan.dtype, *sizes)}
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "complete": False,
        "notes": _notes(plan),
        "machine": machine.facts(plan.device),
        "options": {k: value for k, value in asdict(o).items() if k not in ("data_dir", "out")},
        "dtype": str(plan.dtype).removeprefix("torch."),
        "parameters": parameters,
        "data": {
            "source": "built-in corpus" if o.data_dir is None else o.data_dir.resolve().name,
            "train_tokens": sum(map(len, token_files(plan.data_dir, "train"))),
        },
        "sdpa": sdpa,
        "ceilings": {"before": machine.ceilings(plan.device), "after": None},
    }


def _measure(
    plan: Plan, folder: Path, console: Console, save: Callable[[dict[str, Any]], object]
) -> tuple[dict[str, Any], bool]:
    """Return the record and whether it was interrupted. ``save`` is called with the record whenever
    it grows."""
    run = _facts(plan)

    def add(measured: Measurement) -> None:
        run.update(
            report.record(
                measured.results,
                measured.reference_losses,
                plan.tokens_per_step,
                measured.groups,
                measured.reference_failure,
            )
        )
        save(run)

    with Progress(console=console, auto_refresh=False, transient=True) as progress:
        measurement = Measurement(plan, folder, progress, add)
        try:
            measurement.run()
            run["ceilings"]["after"] = machine.ceilings(plan.device)
        except KeyboardInterrupt:
            add(measurement)
            return run, True
    run["complete"] = True
    add(measurement)
    return run, False


def _planned(argv: list[str] | None, folder: Path) -> tuple[Plan, Path, str]:
    """The plan, and the folder and name of the results. Raises all errors that a user can cause."""
    argv = sys.argv[1:] if argv is None else argv
    default = default_options()
    if "--quick" in argv:
        default, argv = replace(default, **QUICK), [word for word in argv if word != "--quick"]
    options = cli.options(default, argv)
    if options.data_dir is None:
        prepare_builtin(folder / "data")
        plan = Plan.of(options, folder / "data")
    else:
        plan = Plan.of(options, options.data_dir)
    plan.batches(options.vocab_size)
    with torch.device("meta"):
        for variant in options.variants:
            if unsupported(plan, variant) is None:  # fp8 may still reject the sizes
                GPT(plan.config, fp8=VARIANTS[variant].fp8)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%S")
    out = options.out or machine.ROOT / "bench" / "out" / now
    name = f"run-b{options.batch_size}"  # publish.py reads this name
    return plan, cli.results_folder(out, name), name


def main(argv: list[str] | None = None) -> int:
    """Measure, updating the JSON on the way, write the PNG and print the table. Exit code: 0; 1 if
    no variant could be measured; 2 for a wrong argument or data set, without matplotlib, or if the
    float32 reference diverges; 130 after an interrupt."""
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            plan, out, name = _planned(argv, folder)
        except cli.USER_ERRORS as error:
            return cli.failed(error)
        if plan.device.type == "cpu":
            # At this size, threads mostly wait for each other, especially on a busy machine.
            torch.set_num_threads(1)
            console.print("No CUDA GPU: a small size on the CPU, in one thread.")
        try:
            run, interrupted = _measure(
                plan, folder, console, lambda run: cli.write_json(out / f"{name}.json", run)
            )
        except FloatingPointError as error:  # of the reference; a variant's ends only that variant
            return cli.failed(
                f"the float32 reference cannot be trained: {error}; try a smaller learning_rate"
            )
        except KeyboardInterrupt:
            cli.failed("interrupted before anything was measured")
            return 130

    def chart(run: dict[str, Any], path: Path) -> None:
        pictures.speed([run], path)

    cli.write_results(out, name, run, chart, console)
    console.print(report.table(run))
    if interrupted:
        return 130
    return int(not any(variant["tokens_per_s"] for variant in run["variants"].values()))


if __name__ == "__main__":
    sys.exit(main())
