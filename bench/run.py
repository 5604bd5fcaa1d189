"""Tokens per second of GPT training: this library beside PyTorch, in one process.

    python bench/run.py                             # GPT-2 124M on a GPU, a small size on a CPU
    python bench/run.py --batch_size=8 --variants fastgpt sdpa_compile
    python bench/run.py --out bench/results/h200    # for bench/publish.py

Every variant starts from the same weights and sees the same batches of real text. naive and sdpa
are nanoGPT's step as its users run it: whole logits, PyTorch's cross-entropy, AdamW fused on CUDA;
fastgpt is that step with ``fastgpt.GPT`` in it; fastgpt_train is the update of ``fastgpt train``:
bfloat16 weights over float32 masters, as one CUDA graph. The fp8 variants have other numbers and
are measured only when they are named. One step is: the next batch from host to device, forward,
backward, gradient clipping, AdamW; the host reads no loss.

1. fp32 reference, unless ``--reference=False``: ``loss_steps`` steps of nanoGPT's model, eager and
   with masked matmul attention, in float32, four sequences at a time, for the losses alone.
2. Each variant alone on the device: the time to its first step, ``loss_steps`` losses, and the peak
   of allocated memory over those steps but the first.
3. All variants side by side: built again, warmed up for ``warmup`` steps, then ``rounds`` rounds in
   which each takes a turn of ``steps`` timed steps, after two that are not timed. What does not fit
   into the GPU's memory together, by what step 2 found, is measured in groups, one after the other;
   one variant is in all of them, and two variants of different groups are compared by how many
   times as fast as that one each is in its own.

run-b<batch size>.json is written anew after every variant and every turn, and says whether it is
``complete``: what an interrupted run measured is kept. Whatever goes wrong with a variant ends that
one alone.

The time to the first step begins before the model is built and ends when the device has done the
first step: drawing the weights on the host, moving them, compiling, and one step. Cold: dynamo is
reset, and the folders in which torch.compile and Triton keep what they compile are new and empty;
on a GPU torch.compile was loaded before. What an earlier variant of the process compiled stays in
memory, though: of the fastgpt variants the first alone compiles its kernels. Warm: the second time,
with those folders full. Starting Python and importing torch is in neither.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

if __name__ == "__main__":  # Python looks for modules in the folder of the script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._harness import cli, machine
from bench._step import report
from bench._step.measurement import Measurement, unsupported
from bench._step.variants import CPU_OPTIONS, VARIANTS, Options, Plan
from fastgpt import GPT
from fastgpt.data.batches import token_files
from fastgpt.data.builtin_texts import prepare_builtin

_PROTOCOL = {"loss_steps": 100, "warmup": 20, "rounds": 5, "steps": 20}  # at least


def _notes(plan: Plan) -> list[str]:
    """What sets this run apart from the protocol."""
    notes = []
    if plan.device.type == "cpu":
        notes.append(f"{report.CPU_NOTE}: fastgpt runs PyTorch's own ops there")
    few = {key: n for key in _PROTOCOL if (n := getattr(plan.options, key)) < _PROTOCOL[key]}
    if few:
        given = ", ".join(f"{key}={n}" for key, n in few.items())
        least = ", ".join(str(_PROTOCOL[key]) for key in few)
        notes.append(f"short run: {given}; protocol: at least {least}")
    return notes


def _parameters(plan: Plan) -> int:
    with torch.device("meta"):
        return GPT(plan.config).get_num_params()


def _data_facts(plan: Plan) -> dict[str, Any]:
    given = plan.options.data_dir
    return {
        "source": "built-in corpus" if given is None else given.resolve().name,
        "train_tokens": sum(map(len, token_files(plan.data_dir, "train"))),
    }


def _measure(
    plan: Plan, folder: Path, console: Console, save: Callable[[dict[str, Any]], object]
) -> tuple[dict[str, Any], bool]:
    """The record, and whether it was interrupted. ``save`` gets what there is whenever something
    is added."""
    o = plan.options
    run: dict[str, Any] = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "complete": False,
        "notes": _notes(plan),
        "machine": machine.facts(plan.device),
        "options": {
            key: value for key, value in asdict(o).items() if key not in ("data_dir", "out")
        },
        "dtype": str(plan.dtype).removeprefix("torch."),
        "parameters": _parameters(plan),
        "data": _data_facts(plan),
        "sdpa": None,
    }
    if plan.device.type == "cuda":
        run["sdpa"] = machine.sdpa_kernel(
            plan.device, plan.dtype, o.batch_size, o.block_size, o.n_head, o.n_embd
        )
    run["ceilings"] = {"before": machine.ceilings(plan.device), "after": None}

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


def _name(plan: Plan) -> str:
    """Of the files, as ``publish.py`` reads them."""
    return f"run-b{plan.options.batch_size}"


def _planned(argv: list[str] | None, folder: Path) -> tuple[Plan, Path]:
    """What is to be measured and the folder for the results. All that a user can get wrong is
    found here.
    """
    options = cli.options(Options() if torch.cuda.is_available() else CPU_OPTIONS, argv)
    if options.data_dir is None:
        prepare_builtin(folder / "data")
        plan = Plan.of(options, folder / "data")
    else:
        plan = Plan.of(options, options.data_dir)
    plan.batches(options.vocab_size)
    with torch.device("meta"):
        for name in options.variants:
            if unsupported(plan, name) is None:  # then fp8 may still refuse the sizes
                GPT(plan.config, fp8=VARIANTS[name].fp8)
    out = options.out
    if out is None:
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%S")
        out = machine.ROOT / "bench" / "out" / now
    return plan, cli.results_folder(out, _name(plan))


def main(argv: list[str] | None = None) -> int:
    """Measure, write the JSON as it goes and the PNG, print the table; the exit code: 0, 1 where no
    variant could be measured, 2 for a wrong argument or data set, without matplotlib, or where the
    float32 reference diverges, 130 after an interrupt.
    """
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            plan, out = _planned(argv, folder)
        except cli.USER_ERRORS as error:
            return cli.failed(error)
        if plan.device.type == "cpu":
            # At this size threads only wait for each other, and the longer the busier the machine.
            torch.set_num_threads(1)
            console.print("No CUDA GPU: a small size on the CPU, in one thread.")
        try:
            run, interrupted = _measure(
                plan,
                folder,
                console,
                lambda run: cli.write_json(out / f"{_name(plan)}.json", run),
            )
        except FloatingPointError as error:  # a variant's ends nothing
            return cli.failed(
                f"the float32 reference cannot be trained: {error}; try a smaller learning_rate"
            )
        except KeyboardInterrupt:
            cli.failed("interrupted before anything was measured")
            return 130
    cli.write_results(out, _name(plan), run, report.chart, console)
    console.print(report.table(run))
    if interrupted:
        return 130
    return int(not any(variant["tokens_per_s"] for variant in run["variants"].values()))


if __name__ == "__main__":
    sys.exit(main())
