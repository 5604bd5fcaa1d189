"""The candidates of a launch table against the present line: whether they are right, how long they
take, and which one wins.
"""

import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from bench._harness.timing import Clock, interleaved
from bench._roofline.ceilings import Ceilings
from bench._sweep.compile import last_line
from bench._sweep.line import Call, Line, Sizes, Tile

ROUNDS = (3, 15)  # of all candidates, and of those that are close to the best
CLOSE = 1.15
FINALISTS = 8
LEAST_GAIN = 0.01
_FLUSH_BYTES = 1 << 30  # many times the cache

Timer = Callable[[Call], float]  # milliseconds of one run of the call


# -------------------------------------------------------------------------------------- comparing


def difference(got: Sequence[Tensor], present: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    """Where two results differ by more than the order of summation explains: an element by more
    than 4 roundings of its own size and its row's; None if nowhere. A tile that is wrong or missing
    is off by a hundred times that.
    """
    if len(got) != len(present):
        return f"{len(got)} results, not {len(present)}"
    for number, (a, b) in enumerate(zip(got, present, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {number} is {tuple(a.shape)} {a.dtype}"
        if a.numel() == 0:
            continue
        eps = max(torch.finfo(dtype).eps, torch.finfo(b.dtype).eps, 2.0**-12)
        a, b = a.float(), b.float()
        row = b.square().mean(-1, keepdim=True).sqrt() if b.dim() else b.abs()
        excess = (a - b).abs() - 4 * eps * (b.abs() + row)
        if not bool((excess <= 0).all()):  # NaN is not
            wrong = int((~(excess <= 0)).sum())
            return f"result {number} differs in {wrong} of {b.numel()} elements"
    return None


# ----------------------------------------------------------------------------------------- timing


def gpu_timer(device: torch.device) -> Timer:
    """The GPU's time. The host prepares the call while the GPU still writes a buffer that is larger
    than its cache."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def time_call(call: Call) -> float:
        call.reset()
        flush.fill_(1)
        clock = Clock(device)
        clock.mark()
        call.run()
        clock.mark()
        return clock.durations_ms()[0]

    return time_call


@dataclass
class Contest:
    """All candidates of a line at one size: their medians in milliseconds."""

    sizes: Sizes
    present_ms: float
    again_ms: float  # the present line a second time
    ms: dict[Tile, float]
    flops: int
    bytes: int


def fault_of(
    line: Line, tile: Tile, call: Call, present: Sequence[Tensor], dtype: torch.dtype
) -> str | None:
    """What is wrong with the candidate's results; None if nothing."""
    with line.put(tile):
        call.reset()
        try:
            return difference(call.run(), present, dtype)
        except TritonError as error:
            return f"does not launch: {last_line(error)}"


def wrong(
    line: Line, tiles: Iterable[Tile], device: torch.device, dtype: torch.dtype
) -> dict[Tile, str]:
    """The candidates that do not compute what the present line computes, and where."""
    found: dict[Tile, str] = {}
    left = list(tiles)
    for sizes in line.sizes:
        torch.manual_seed(0)
        with line.put(line.current):
            call = line.call(device, dtype, sizes)
            call.reset()
            present = [out.clone() for out in call.run()]
        for tile in left:
            fault = fault_of(line, tile, call, present, dtype)
            if fault is not None:
                found[tile] = f"{fault} at {label(sizes)}"
        left = [tile for tile in left if tile not in found]
    return found


def contest(
    line: Line,
    tiles: Iterable[Tile],
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer,
) -> Contest:
    with line.put(line.current):
        call = line.call(device, dtype, sizes)

    def times(entries: Sequence[tuple[Tile, bool]], rounds: int) -> dict[tuple[Tile, bool], float]:
        ms: dict[tuple[Tile, bool], list[float]] = {entry: [] for entry in entries}
        for _, entry in interleaved(entries, rounds):
            with line.put(entry[0]):
                ms[entry].append(timer(call))
        return {entry: statistics.median(values) for entry, values in ms.items()}

    own = [(line.current, False), (line.current, True)]  # True: again
    ms = times([*own, *((tile, False) for tile in tiles)], ROUNDS[0])
    best = min(ms.values())
    close = sorted((e for e in ms if e not in own and ms[e] <= CLOSE * best), key=ms.__getitem__)
    ms |= times([*own, *close[:FINALISTS]], ROUNDS[1])
    return Contest(
        sizes,
        ms.pop(own[0]),
        ms.pop(own[1]),
        {tile: value for (tile, _), value in ms.items()},
        call.flops,
        call.bytes,
    )


def label(sizes: Sizes) -> str:
    return " ".join(f"{name}{size}" for name, size in sizes.items())


def measured(
    line: Line,
    tiles: Sequence[Tile],
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer,
    show: Callable[[str], None],
) -> tuple[list[Contest], dict[Tile, str]]:
    """One contest a size; why candidates were rejected before."""
    show(f"{line.name}: checking {len(tiles)} candidates")
    rejected = wrong(line, tiles, device, dtype)
    left = [tile for tile in tiles if tile not in rejected]
    contests = []
    for sizes in line.sizes:
        show(f"{line.name}: timing {len(left)} candidates at {label(sizes)}")
        contests.append(contest(line, left, sizes, device, dtype, timer))
    return contests, rejected


def verdict(
    line: Line, contests: Sequence[Contest], ceilings: Ceilings, half: bool
) -> dict[str, Any]:
    """The best candidate over all sizes, or the present line."""
    scores: dict[Tile, float] = {line.current: 1.0}
    for tile in contests[0].ms:
        ratios = [contest.ms[tile] / contest.present_ms for contest in contests]
        scores[tile] = statistics.geometric_mean(ratios)
    noise = statistics.geometric_mean(
        [math.exp(abs(math.log(c.again_ms / c.present_ms))) for c in contests]
    )
    best = min(scores, key=scores.__getitem__)
    gain = 1.0 / scores[best]
    if gain <= max(noise, 1.0 + LEAST_GAIN):
        best, gain = line.current, 1.0
    rows = []
    for found in contests:
        ms = {line.current: found.present_ms, **found.ms}
        own_best = min(ms, key=ms.__getitem__)
        rows.append(
            {
                "sizes": dict(found.sizes),
                "ms": ms[best],
                "present_ms": found.present_ms,
                "present_again_ms": found.again_ms,
                "tflop_per_s": found.flops / ms[best] / 1e9 if found.flops else None,
                "tb_per_s": found.bytes / ms[best] / 1e9,
                "share_of_ceiling": ceilings.ms(found.flops, found.bytes, half) / ms[best],
                "own_best": own_best,
                "own_best_ms": ms[own_best],
            }
        )
    return {
        "best": best,
        "present": line.current,
        "gain": gain,
        "noise": noise - 1.0,
        "sizes": rows,
        "scores": [[tile, score] for tile, score in sorted(scores.items(), key=lambda x: x[1])],
        "line": line.text(best),
    }


def comment(found: dict[str, Any], machine: str, dtype: torch.dtype) -> str:
    """What stands above the line in the table."""
    first = found["sizes"][0]
    flops = "" if first["tflop_per_s"] is None else f", {first['tflop_per_s']:.0f} TFLOP/s"
    text = (
        f"{machine}, {str(dtype).removeprefix('torch.')}: {first['ms']:.4g} ms at "
        f"{label(first['sizes'])}{flops}, {first['tb_per_s']:.2f} TB/s, "
        f"{first['share_of_ceiling']:.0%} of the ceiling; "
    )
    if found["best"] == found["present"]:
        text += f"none of {len(found['scores']) - 1} others is faster"
    else:
        text += f"{found['gain']:.2f}x of {found['present']} over {len(found['sizes'])} sizes"
    others = [
        f"{tuple(row['own_best'] or ()) or 'cuBLAS'} {row['ms'] / row['own_best_ms']:.2f}x "
        f"at {label(row['sizes'])}"
        for row in found["sizes"]
        if row["ms"] > 1.03 * row["own_best_ms"]
    ]
    text += f" (faster at one size: {'; '.join(others)})" if others else ""
    return "\n".join(textwrap.wrap(text, 98, initial_indent="# ", subsequent_indent="# "))
