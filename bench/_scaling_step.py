"""A training step on many GPUs: what of it is communication, and how much of that the computation
hides. The timeline of one GPU is played against a queue of collectives, as PyTorch issues them.

DDP: gradients are gathered into buckets in the order in which they come; a full one is
all-reduced beside the rest of the backward. The embedding's gradient comes last, since the head's
weight is tied to it, so the largest bucket is never hidden.

FSDP2, as ``fastgpt.fsdp`` has it: every block is a group of its own; the LayerNorms are one that
travels in float32 and stays whole until its backward, and the embeddings are the root's.
A group is all-gathered before it computes, forward and backward, while the ones before it compute,
and its gradients are reduce-scattered behind it. The first gathers of a micro-batch have nothing
to hide behind, nor have the last reduce-scatters, of norms and embeddings. The copies into and out
of the buffers are computation.

Both sum the number of valid targets over all GPUs before the step and the loss behind it, FSDP2
the squares of all gradients too. Not counted: kernels slowed down by the collectives beside them,
the host, and waiting for the slowest GPU.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod

from _ceilings import Ceilings
from _scaling_links import Cluster, Kind, sent_bytes
from _scaling_timeline import Gradient, Timeline

FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20  # DDP's defaults

_COUNT_BYTES, _LOSS_BYTES = 8, 4  # of valid targets, int64; float32
_NORM_BYTES = 4  # of each gradient, float32
# AdamW reads and writes a parameter and its moments and reads its gradient, which was read before
# for the norm; a parameter held in half precision is written a second time.
_UPDATE_BYTES, _ROUNDED_BYTES = 28 + 4, 2


@dataclass(frozen=True)
class Step:
    """One update. ``collectives``: what is sent and how many bytes the whole tensor has, in the
    order in which it is sent. ``exposed_ms``: how long the computation stands still for them."""

    gpus: int
    ms: float
    exposed_ms: float
    communication_ms: float
    collectives: tuple[tuple[Kind, int], ...]

    @property
    def sent_bytes(self) -> float:
        """By each GPU."""
        return sum(sent_bytes(kind, payload, self.gpus) for kind, payload in self.collectives)


def buckets(
    gradients: Iterable[Gradient], first: int = FIRST_BUCKET_BYTES, other: int = BUCKET_BYTES
) -> list[list[Gradient]]:
    """DDP's buckets from the second step on: each is closed as soon as it has ``first`` bytes, or
    ``other`` if it is not the first one. Gradients of different sizes do not mix."""
    closed: list[list[Gradient]] = []
    of_size: dict[int, list[list[Gradient]]] = {}
    for gradient in gradients:
        mine = of_size.setdefault(gradient.itemsize, [[]])
        mine[-1].append(gradient)
        if _nbytes(mine[-1]) >= (first if len(mine) == 1 else other):
            closed.append(mine[-1])
            mine.append([])
    return closed + [mine[-1] for mine in of_size.values() if mine[-1]]


def _nbytes(gradients: Iterable[Gradient]) -> int:
    return sum(gradient.numel * gradient.itemsize for gradient in gradients)


@dataclass
class _Lanes:
    """One GPU's computation and its queue of collectives: how far each has come, in ms."""

    cluster: Cluster
    ceilings: Ceilings
    gpus: int
    computed: float = 0.0
    sent: float = 0.0
    exposed: float = 0.0
    communication: float = 0.0
    collectives: list[tuple[Kind, int]] = field(default_factory=list)

    def compute(self, ms: float) -> None:
        self.computed += ms

    def move(self, nbytes: int) -> None:
        """A kernel that does no more than that in device memory."""
        self.compute(self.ceilings.ms(0, nbytes, half=True))

    def accumulate(self, gradients: Iterable[Gradient], itemsize: int) -> None:
        """Add gradients to sums of ``itemsize`` bytes."""
        self.move(sum(g.numel * (g.itemsize + 2 * itemsize) for g in gradients))

    def wait(self, until: float) -> None:
        """The computation goes on at ``until``, or now if that is over."""
        self.exposed += max(0.0, until - self.computed)
        self.computed = max(self.computed, until)

    def send(self, kind: Kind, payload: int, ready: float) -> float:
        """Queue a collective whose data is there at ``ready``; when it is done."""
        if self.gpus == 1:
            return ready
        ms = self.cluster.ms(kind, payload, self.gpus)
        self.collectives.append((kind, payload))
        self.communication += ms
        self.sent = max(self.sent, ready) + ms
        return self.sent

    def sum(self, payload: int) -> None:
        """Over all GPUs; the computation needs it at once."""
        self.wait(self.send("all-reduce", payload, self.computed))

    def step(self) -> Step:
        return Step(
            self.gpus, self.computed, self.exposed, self.communication, tuple(self.collectives)
        )


def ddp(
    timeline: Timeline, cluster: Cluster, ceilings: Ceilings, gpus: int, micro_batches: int = 1
) -> Step:
    """DistributedDataParallel, gradients being views of the buckets; those of all micro-batches but
    the last are added up without talking."""
    gradients = timeline.gradients
    lanes = _Lanes(cluster, ceilings, gpus)
    lanes.sum(_COUNT_BYTES)
    for micro_batch in range(micro_batches):
        lanes.compute(sum(timeline.forward))
        if micro_batch > 0:
            lanes.accumulate(gradients, 4)
        if micro_batch == micro_batches - 1:
            for bucket in buckets(gradients):
                ready = lanes.computed + max(gradient.ready_ms for gradient in bucket)
                lanes.send("all-reduce", _nbytes(bucket), ready)
        lanes.compute(sum(timeline.backward))
    lanes.wait(lanes.sent)
    lanes.sum(_LOSS_BYTES)
    rounded = sum(g.numel for g in gradients if g.itemsize == 2)
    lanes.move(_UPDATE_BYTES * timeline.numel + _ROUNDED_BYTES * rounded)
    return lanes.step()


def fsdp(
    timeline: Timeline,
    cluster: Cluster,
    ceilings: Ceilings,
    gpus: int,
    micro_batches: int = 1,
    reduce_itemsize: int = 4,
) -> Step:
    """FSDP2. Parameters are gathered in the dtype of the timeline; gradients of all micro-batches
    together are reduced in ``reduce_itemsize`` bytes."""
    lanes = _Fsdp(cluster, ceilings, gpus, reduce_itemsize=reduce_itemsize)
    lanes.sum(_COUNT_BYTES)
    for micro_batch in range(micro_batches):
        last_gather = lanes.forward(timeline)
        if micro_batch > 0:
            lanes.accumulate(timeline.gradients, reduce_itemsize)
        lanes.backward(timeline, last_gather, synchronise=micro_batch == micro_batches - 1)
    lanes.wait(lanes.sent)
    lanes.sum(_LOSS_BYTES)
    lanes.sum(_NORM_BYTES * len(timeline.gradients))
    lanes.move(_UPDATE_BYTES * -(-timeline.numel // gpus))
    return lanes.step()


@dataclass
class _Fsdp(_Lanes):
    reduce_itemsize: int = 4
    reduced: float = 0.0  # when the last reduce-scatter is done

    def forward(self, timeline: Timeline) -> float:
        """Returns when the gather of the last block, for the backward, is done."""
        root, norms, *blocks = _groups(timeline.gradients)
        first, *others, loss = timeline.forward
        # A gather waits for the copy out of the buffer of the one before the last.
        copied = [self.computed, self.computed]
        for group, ms in zip([root, norms, *blocks], [first, 0.0, *others], strict=True):
            self._use(group, self._gather(group, copied[-2]))
            copied.append(self.computed)
            self.compute(ms)
        gathered = self._gather(blocks[-1], self.computed)
        self.compute(loss)
        return gathered

    def backward(self, timeline: Timeline, gathered: float, synchronise: bool) -> None:
        root, norms, *blocks = _groups(timeline.gradients)
        loss, *others, last = timeline.backward
        self.compute(loss)
        for number, ms in zip(reversed(range(len(blocks))), others, strict=True):
            self._use(blocks[number], gathered)
            if number > 0:
                gathered = self._gather(blocks[number - 1], self.computed)
            self.compute(ms)
            if synchronise:
                self._reduce(blocks[number])
        self.compute(last)
        if synchronise:
            self._reduce(norms)
            self._reduce(root)

    def _gather(self, group: list[Gradient], ready: float) -> float:
        return self.send("all-gather", self._padded(group, group[0].itemsize), ready)

    def _use(self, group: list[Gradient], gathered: float) -> None:
        self.wait(gathered)
        self._copy(self._padded(group, 2 * group[0].itemsize))

    def _reduce(self, group: list[Gradient]) -> None:
        self.wait(self.reduced)  # one buffer at a time
        self._copy(self._padded(group, group[0].itemsize + self.reduce_itemsize))
        payload = self._padded(group, self.reduce_itemsize)
        self.reduced = self.send("reduce-scatter", payload, self.computed)

    def _copy(self, nbytes: int) -> None:
        if self.gpus > 1:
            self.move(nbytes)

    def _padded(self, group: list[Gradient], itemsize: int) -> int:
        """Bytes of a group, each parameter made up to equal parts of its rows."""
        rows = ((-(-g.shape[0] // self.gpus) * self.gpus, g.shape[1:]) for g in group)
        return sum(n_rows * prod(others) for n_rows, others in rows) * itemsize


_IN_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(.+)")


def _groups(gradients: Iterable[Gradient]) -> list[list[Gradient]]:
    """The root's, the LayerNorms', and each block's in order."""
    root: list[Gradient] = []
    norms: list[Gradient] = []
    blocks: dict[int, list[Gradient]] = {}
    for gradient in gradients:
        found = _IN_BLOCK.fullmatch(gradient.name)
        if gradient.name.startswith("transformer.ln_f.") or (found and found[2].startswith("ln_")):
            norms.append(replace(gradient, itemsize=4))
        elif found:
            blocks.setdefault(int(found[1]), []).append(gradient)
        else:
            root.append(gradient)
    return [root, norms, *(blocks[number] for number in sorted(blocks))]
