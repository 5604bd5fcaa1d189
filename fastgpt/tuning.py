"""``tune``: which launch configurations are fastest on this GPU, for the shapes of one model.

    tune(Workload(GPTConfig(), batch_size=32), torch.device("cuda"), seconds=180)

A model of one layer shows which ops a training step calls, on which tensors; each call shows which
lines of the launch tables it asks for. Of a line's candidates, those that the compiler refuses or
whose outputs and gradients err more than the parity rule allows are left out. The others are timed
in turns, on the model's own tensors, forward or backward. One replaces the present line if it is
faster by 1% and by more than the noise. What is decided is written down at once, so that the next
``tune`` goes on where this one was stopped. float32 keeps the lines of ``configs.TABLE``, but for
kernels whose lines do not depend on the dtype; so do decoding and fp8.

    python -m fastgpt.tuning '{"n_layer": 12, "batch_size": 32}'     # without tyro
"""

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt import ops as default_ops
from fastgpt._files import exclusive_lock, write_json
from fastgpt._progress import progress_bar
from fastgpt.devices import autocast
from fastgpt.kernels import _host, configs, reference, torch_ops, tuned_table
from fastgpt.kernels.candidates import candidates, same
from fastgpt.kernels.compile_ahead import compile_ahead
from fastgpt.kernels.configs import Key, decoded, decoded_key, encoded
from fastgpt.language_model import GPTConfig
from fastgpt.model import GPT
from fastgpt.timing import Occupier, interleaved, milliseconds, synchronize

ROUNDS = 10
LEAST_GAIN = 1.01
_DOCUMENT = 256  # tokens, where sequences hold several
_MOST_PARAMETERS = 1 << 26  # in AdamW's update, whose time is proportional to them

Show = Callable[[str], None]


@dataclass(frozen=True)
class Workload:
    """A model in training, on one GPU: its shape, and what else decides which kernels it needs."""

    config: GPTConfig
    batch_size: int = 32
    dtype: torch.dtype = torch.bfloat16
    recompute: bool = False
    document_mask: bool = False

    def __str__(self) -> str:
        """All of it, in one line; stands in the file for what it holds."""
        shape = asdict(self.config)
        keys = {"batch_size": self.batch_size, "dtype": str(self.dtype).removeprefix("torch.")}
        keys |= {name: True for name in ("recompute", "document_mask") if getattr(self, name)}
        return " ".join(f"{name}={value}" for name, value in (shape | keys).items())


# ------------------------------------------------------------------------- what a model calls


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an op. Its tensors are leaves of their own, which want the same gradients."""

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dtype: torch.dtype  # of autocast

    def __str__(self) -> str:
        tensors = (x for x in _flat((self.args, self.kwargs)) if isinstance(x, Tensor))
        shapes = (f"{tuple(x.shape)}" for x in tensors if x.dim() > 1)
        return " ".join((self.op, *shapes))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for one in value:
            yield from _flat(one)
    else:
        yield value


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(change, one) for name, one in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_mapped(change, one) for one in value)
    return value


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)


def _recording(ops: ModuleType, dtype: torch.dtype, calls: list[Call]) -> ModuleType:
    """``ops``, whose calls are noted."""
    recorder = ModuleType("recorder")

    def recorded(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(Call(name, _mapped(_leaf, args), _mapped(_leaf, kwargs), dtype))
            return getattr(ops, name)(*args, **kwargs)

        return call

    for name in reference.OPS:
        setattr(recorder, name, recorded(name))
    recorder.dropout_seed = ops.dropout_seed  # type: ignore[attr-defined]
    return recorder


def _calls_with(n_layer: int, work: Workload, device: torch.device, ops: ModuleType) -> list[Call]:
    """The calls of a forward pass of the model with ``n_layer`` layers."""
    calls: list[Call] = []
    config = replace(work.config, n_layer=n_layer)
    with device:
        model = GPT(config, _recording(ops, work.dtype, calls), recompute=work.recompute)
        idx = torch.randint(1, max(2, config.vocab_size), (work.batch_size, config.block_size))
        idx.clamp_(max=config.vocab_size - 1)
    if work.document_mask:
        model.eot_token = 0
        idx[:, ::_DOCUMENT] = 0
    if work.dtype == torch.bfloat16:  # as MasterAdamW holds it
        for p in model.low_precision_parameters():
            p.data = p.data.to(work.dtype)
    with autocast(device, work.dtype):
        model(idx, idx)
    return calls


def calls_of(
    work: Workload, device: torch.device, ops: ModuleType = default_ops
) -> list[tuple[Call, int]]:
    """The calls of a training step that differ, and how often each is made."""
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in GPT(work.config).parameters())
    once = _calls_with(1, work, device, ops)
    in_one = Counter(map(str, once))
    in_two = Counter(map(str, _calls_with(2, work, device, ops)))
    counts = {
        name: n + (work.config.n_layer - 1) * (in_two[name] - n) for name, n in in_one.items()
    }
    found = [(call, counts[name]) for name, call in {str(call): call for call in once}.items()]
    return [*found, (_adamw(min(n_parameters, _MOST_PARAMETERS), work.dtype, device), 1)]


def _adamw(n: int, dtype: torch.dtype, device: torch.device) -> Call:
    """The update of ``MasterAdamW``."""
    param, grad, exp_avg, exp_avg_sq = (torch.randn(n, device=device) for _ in range(4))
    rounded = param.to(dtype)
    step, lr, clip, skip = (torch.full((), x, device=device) for x in (1.0, 1e-3, 1.0, 0.0))
    state = param, rounded, grad, exp_avg, exp_avg_sq.square_(), step, lr
    options = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=clip, skip=skip)
    return Call("adamw", state, options, torch.float32)


# --------------------------------------------------------------------------------- running them


class Phase:
    """The forward or the backward pass of a call: lines of the launch tables are timed with it."""

    def __init__(self, call: Call, count: int, backward: bool, ops: ModuleType) -> None:
        self.call, self.count, self.backward, self._ops = call, count, backward, ops
        tensors = [x for x in _flat((call.args, call.kwargs)) if isinstance(x, Tensor)]
        self.device = tensors[0].device
        self.leaves = [x for x in tensors if x.requires_grad]
        self.out_grads: list[Tensor] = []

    def __str__(self) -> str:
        return f"{self.call} {'backward' if self.backward else 'forward'}"

    def prepared(self) -> Callable[[], Any]:
        """The work; all that comes before it is done."""
        if not self.backward:
            return lambda: self._forward(self._ops)
        outputs = self._forward(self._ops)
        grads = self._out_grads(outputs)
        return lambda: torch.autograd.grad(outputs, self.leaves, grads, allow_unused=True)

    def run(self) -> None:
        """With all that comes before it."""
        self.prepared()()

    def _forward(self, ops: ModuleType) -> tuple[Tensor, ...]:
        with autocast(self.device, self.call.dtype):
            return _tensors(getattr(ops, self.call.op)(*self.call.args, **self.call.kwargs))

    def _out_grads(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        if not self.out_grads:
            self.out_grads = [
                torch.randn_like(t) if t.dim() else torch.ones_like(t) for t in outputs
            ]
        return self.out_grads

    def check(self, right: "Right") -> None:
        """AssertionError where an output or a gradient of our op, as it is now, errs too much."""
        errors = rms_errors(_results(self.call, self._ops, None, self.out_grads), right.values)
        for number, (error, limit) in enumerate(zip(errors, right.limits, strict=True)):
            if not error <= limit:
                raise AssertionError(
                    f"result {number} errs by {error:.3g}, allowed are {limit:.3g}"
                )

    def right(self) -> "Right":
        """What ``check`` compares with. Dropout's masks are ours alone: with them, our op as it is
        now stands for PyTorch's."""
        plain = self._ops if self.call.kwargs.get("seed") is not None else torch_ops
        if not self.out_grads:
            self._out_grads(self._forward(self._ops))
        values = _results(self.call, plain, torch.float32, self.out_grads)
        errors = rms_errors(_results(self.call, plain, None, self.out_grads), values)
        scales = [float(x.float().square().mean().sqrt()) for x in values]
        return Right(values, [2 * e + 1e-5 * x for e, x in zip(errors, scales, strict=True)])


class Right(NamedTuple):
    """Outputs and gradients in float32, and the RMS error that each may have: twice that of
    PyTorch's own kernels in the model's dtype, plus 1e-5 of the values."""

    values: list[Tensor]
    limits: list[float]


def _results(
    call: Call, ops: ModuleType, dtype: torch.dtype | None, out_grads: list[Tensor]
) -> list[Tensor]:
    """Outputs, then gradients, in ``dtype``, or (None) as the model calls the op."""
    wide = None if call.op == "adamw" else dtype  # its state has the dtypes that it has

    def copied(x: Tensor) -> Tensor:
        to = wide if wide is not None and x.is_floating_point() else x.dtype
        return x.detach().to(to, copy=True).requires_grad_(x.requires_grad)

    args, kwargs = _mapped(copied, call.args), _mapped(copied, call.kwargs)
    inputs = [x for x in _flat((args, kwargs)) if isinstance(x, Tensor)]
    with _exact_products():
        with autocast(inputs[0].device, dtype or call.dtype):
            outputs = _tensors(getattr(ops, call.op)(*args, **kwargs))
        if not outputs:  # it has written to its arguments
            return inputs
        leaves = [x for x in inputs if x.requires_grad]
        grads = [g.to(x.dtype) for g, x in zip(out_grads, outputs, strict=True)]
        found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    return [x.detach() for x in (*outputs, *found) if x is not None]


def _tensors(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else () if out is None else (out,)


@contextmanager
def _exact_products() -> Iterator[None]:
    """float32 products without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def rms_errors(found: Sequence[Tensor], right: Sequence[Tensor]) -> list[float]:
    """Of each tensor."""
    return [
        float((x.to(y.dtype) - y).square().mean().sqrt()) for x, y in zip(found, right, strict=True)
    ]


# ----------------------------------------------------------------------- which lines they ask for


class _Watched(dict[Key, Any]):
    """Lines that note what is asked for."""

    def __init__(self, lines: Mapping[Key, Any]) -> None:
        super().__init__(lines)
        self.asked: list[Key] = []

    def __bool__(self) -> bool:
        return True

    def get(self, key: Key, default: Any = None) -> Any:
        self.asked.append(key)
        return super().get(key, default)


def asked_by(phase: Phase) -> list[Key]:
    """The lines that a phase asks for, each once."""
    lines = configs.tuned(phase.device)
    work = phase.prepared()
    watched = _Watched(lines)
    configs.use_tuned(phase.device, watched)
    try:
        work()
    finally:
        configs.use_tuned(phase.device, lines)
    return list(dict.fromkeys(watched.asked))


def choices(key: Key, device: torch.device) -> list[Any]:
    """What may stand in a line, that of ``configs.TABLE`` first."""
    dtype = torch.bfloat16 if key.dtype == "half" else getattr(torch, key.dtype)
    capability = _host.capability(device)
    return candidates(key.op, key.kernel, capability, dtype, key.size, key.options)


# ---------------------------------------------------------------------------------- the table


@dataclass
class Line:
    """What was decided for a line of the launch tables.

    ``ms`` and ``present_ms`` are of the phases ``at`` which it was measured, together, each as
    often as a training step has it; ``noise`` is how many times two measurements of the present
    line differ."""

    key: Key
    config: Any
    at: list[str]
    ms: float
    present_ms: float
    noise: float
    n_tried: int

    @property
    def gain(self) -> float:
        """How many times as fast as the line of ``configs.TABLE``."""
        return self.present_ms / self.ms


@dataclass
class Table:
    """The file of a device, and what it decides."""

    device: torch.device
    lines: dict[Key, Line] = field(default_factory=dict)
    rejected: list[tuple[Key, Any, str]] = field(default_factory=list)  # and why
    workloads: list[str] = field(default_factory=list)  # of which all lines are decided

    @classmethod
    def read(cls, device: torch.device) -> "Table":
        """Empty where there is no file, or, with a warning, a damaged one."""
        with tuned_table.notice_of_damage(device):
            held = tuned_table.read(device)
            lines = [
                Line(**{**one, "key": decoded_key(one["key"]), "config": decoded(one["config"])})
                for one in held.get("lines", [])
            ]
            rejected = [
                (decoded_key(key), decoded(config), str(why))
                for key, config, why in held.get("rejected", [])
            ]
            return cls(device, {one.key: one for one in lines}, rejected, held.get("workloads", []))
        return cls(device)

    def write(self) -> None:
        """Atomically."""
        path = tuned_table.path_of(self.device)
        assert path is not None
        held: dict[str, Any] = {
            "made_for": tuned_table.made_for(self.device),
            "workloads": self.workloads,
            "lines": [
                {**vars(one), "key": one.key, "config": encoded(one.config)}
                for one in self.lines.values()
            ],
            "rejected": [[key, encoded(config), why] for key, config, why in self.rejected],
        }
        held = json.loads(json.dumps(held))  # tuples are lists in the file, and for its checksum
        write_json({**held, "sha256": tuned_table.checksum(held)}, path)

    def why_not(self, key: Key, config: Any) -> str | None:
        """Why a configuration was rejected before."""
        for rejected, other, why in self.rejected:
            if rejected == key and same(other, config):
                return why
        return None


def exported(table: Table) -> list[str]:
    """Lines for ``configs.TABLE``: those that are not there."""
    found = []
    for key, line in table.lines.items():
        if same(line.config, choices(key, table.device)[0]):
            continue
        given = [*key[:-1], *([key.options] if key.options else [])]
        while given[-1] == configs.ANY and len(given) > 2:
            given.pop()
        arguments = ", ".join(repr(x) for x in given).replace("'", '"')
        value = repr(line.config).replace("'", '"')
        found.append(f"Key({arguments}): {value},  # {line.gain:.2f} times as fast")
    return found


# ------------------------------------------------------------------------------------- tuning


class Tuner:
    """Decides one line after the other."""

    def __init__(self, table: Table, show: Show) -> None:
        self._table, self._device, self._show = table, table.device, show
        lines = {key: line.config for key, line in table.lines.items()}
        self._lines = configs.use_tuned(table.device, lines)
        self._occupy = Occupier(table.device)

    def decide(self, key: Key, phases: Sequence[Phase]) -> Line:
        """Check and time the candidates of a line. What is decided is in effect and written."""
        present, *others = choices(key, self._device)
        with self._using(key, present):
            right = {id(phase.call): phase.right() for phase in phases}
        self._compile(key, phases, others)
        good = [present, *(c for c in others if self._passes(key, c, phases, right))]
        right.clear()
        ms = self._times(key, phases, good)
        best, noise = verdict(ms)
        at = sorted(map(str, phases))
        line = Line(key, good[best], at, ms[best], ms[0], noise, len(good))
        self._lines[key], self._table.lines[key] = line.config, line
        self._table.write()
        return line

    @contextmanager
    def _using(self, key: Key, config: Any) -> Iterator[None]:
        """Within, launches take ``config`` for this line."""
        before = self._lines.get(key)
        self._lines[key] = config
        try:
            yield
        finally:
            if before is None:
                del self._lines[key]
            else:
                self._lines[key] = before

    def _compile(self, key: Key, phases: Sequence[Phase], tried: Sequence[Any]) -> None:
        def call(config: Any, phase: Phase) -> None:
            with self._using(key, config), suppress(Exception):  # it fails again where it counts
                phase.run()

        compile_ahead(partial(call, config, phase) for config in tried for phase in phases)

    def _passes(
        self, key: Key, config: Any, phases: Sequence[Phase], right: Mapping[int, Right]
    ) -> bool:
        """Whether a candidate is right; one that is not is written down and shown."""
        why = self._table.why_not(key, config)
        if why is None:
            try:
                with self._using(key, config):
                    for phase in phases:
                        phase.check(right[id(phase.call)])
                return True
            except Exception as error:  # Triton, MLIR and ptxas share no class for what they refuse
                lines = str(error).strip().splitlines()
                why = ": ".join([type(error).__name__, *lines[:1]])
                if not isinstance(error, torch.OutOfMemoryError):  # that may be different next time
                    self._table.rejected.append((key, config, why))
                    self._table.write()
            self._check_device(config)
        self._show(f"{name_of(key)}: {config} is left out: {why}")
        return False

    def _check_device(self, config: Any) -> None:
        """An illegal address leaves a process without its GPU."""
        try:
            synchronize(self._device)
        except RuntimeError as error:
            raise RuntimeError(
                f"the GPU failed with {config}, which will be left out: tune again to go on"
            ) from error

    def _times(self, key: Key, phases: Sequence[Phase], good: Sequence[Any]) -> dict[int, float]:
        """Milliseconds of all phases in a training step with each configuration, by its number; -1:
        with the present one, a second time."""
        total = dict.fromkeys(range(-1, len(good)), 0.0)
        for phase in phases:
            found: dict[int, list[float]] = {number: [] for number in total}
            for _, number in interleaved(list(total), ROUNDS):
                with self._using(key, good[max(number, 0)]):
                    work = phase.prepared()
                    self._occupy()
                    found[number].append(milliseconds(work, self._device))
            for number, ms in found.items():
                total[number] += phase.count * statistics.median(ms)
        return total

    def once(self, phase: Phase) -> float:
        """About how long a phase takes, in a training step."""
        phase.run()
        work = phase.prepared()
        self._occupy()
        return phase.count * milliseconds(work, self._device)


def verdict(ms: Mapping[int, float]) -> tuple[int, float]:
    """The number of the best candidate, 0 for the present one, and the noise: how many times the
    present one's two measurements, 0 and -1, differ. It wins by more than that and by 1%."""
    noise = max(ms[-1], ms[0]) / min(ms[-1], ms[0])
    best = min((number for number in ms if number >= 0), key=ms.__getitem__)
    wins = ms[0] / ms[best] > max(noise, LEAST_GAIN)
    return (best if wins else 0), noise


def name_of(key: Key) -> str:
    """A line, for a reader."""
    size = [] if key.size == configs.ANY else [str(key.size)]
    return " ".join((key.op, key.kernel, *size, *key.options))


def tune(
    work: Workload,
    device: torch.device,
    *,
    seconds: float = 180.0,
    only_missing: bool = False,
    ops: ModuleType = default_ops,
    show: Show = print,
    progress: Callable[..., None] = lambda fraction, text="": None,
) -> tuple[Table, int]:
    """Choose the launch configurations for a model on this device, write them to its file, and use
    them in this process from now on.

    Args:
        work: the model.
        device: a CUDA GPU.
        seconds: begin no further line after that.
        only_missing: take a line that is in the file as it is; else only if it was measured with
            the same shapes.
        ops: as for ``GPT``.
        show: gets a line of text for each candidate that is left out.
        progress: ``progress(fraction, text)``.

    Returns:
        The table, with lines for other models if there are any, and how many lines of this model
        are not decided yet.

    Raises:
        ValueError: ``FASTGPT_TUNED`` is empty, or another process is tuning.
        OSError: the file cannot be written.
        RuntimeError: a candidate made the GPU fail; what was decided is kept.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    deadline = time.monotonic() + seconds
    path = tuned_table.path_of(device)
    if path is None:
        raise ValueError(f"{tuned_table.VARIABLE} must name a folder for tuning, got ''")
    path.parent.mkdir(parents=True, exist_ok=True)
    on_gpu = device.type == "cuda"
    with (
        exclusive_lock(path.parent),
        torch.random.fork_rng([device.index] if on_gpu else []),
        torch.cuda.device(device) if on_gpu else nullcontext(),
    ):
        table = Table.read(device)
        tuner = Tuner(table, show)
        progress(None, "looking at the model")
        phases = [
            Phase(call, count, backward, ops)
            for call, count in calls_of(work, device, ops)
            for backward in ((False, True) if call.op != "adamw" else (False,))
        ]
        compile_ahead(phase.run for phase in phases)
        times = {phase: tuner.once(phase) for phase in phases}
        done = 0
        while True:
            left = _left(table, phases, times, only_missing)
            if not left or time.monotonic() >= deadline:
                break
            for key, at in left:
                if time.monotonic() >= deadline:
                    break
                progress(done / (done + len(left)), name_of(key))
                line = tuner.decide(key, at)
                done += 1
                if not same(line.config, choices(key, device)[0]):
                    break  # other kernels may be launched now
        if not left and str(work) not in table.workloads:
            table.workloads.append(str(work))
            table.write()
    return table, len(left)


def _left(
    table: Table, phases: Sequence[Phase], times: Mapping[Phase, float], only_missing: bool
) -> list[tuple[Key, list[Phase]]]:
    """The lines that are not decided, and the phases that ask for them: the most time first."""
    asking: dict[Key, list[Phase]] = {}
    for phase in phases:
        for key in asked_by(phase):
            asking.setdefault(key, []).append(phase)
    left = []
    for key, at in asking.items():
        line = table.lines.get(key)
        decided = line is not None and (only_missing or line.at == sorted(map(str, at)))
        if not decided and len(choices(key, table.device)) > 1:
            left.append((key, at))
    return sorted(left, key=lambda one: -sum(times[phase] for phase in one[1]))


def main(argv: Sequence[str]) -> int:
    """``python -m fastgpt.tuning JSON``: an object with fields of ``GPTConfig`` and ``Workload``,
    and ``device``, ``seconds`` and ``only_missing`` of ``tune``. What ``fastgpt train`` starts."""
    keys = {"device": "cuda", "seconds": 180.0, "only_missing": False, **json.loads(argv[0])}
    shape = GPTConfig(**{f.name: keys.pop(f.name) for f in fields(GPTConfig) if f.name in keys})
    device, seconds, only_missing = (keys.pop(k) for k in ("device", "seconds", "only_missing"))
    if "dtype" in keys:
        keys["dtype"] = getattr(torch, keys["dtype"])
    work = Workload(shape, **keys)
    with progress_bar("tuning") as progress:
        table, left = tune(
            work,
            torch.device(device),
            seconds=seconds,
            only_missing=only_missing,
            progress=progress,
        )
    for line in table.lines.values():
        print(f"{name_of(line.key)}: {line.gain:.3f} times as fast, {line.config}")
    print(f"{left} lines are not decided" if left else "all lines are decided")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
