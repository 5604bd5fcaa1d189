"""Mutation testing: does the machine notice a deleted or changed instruction of a kernel?"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from triton.runtime.jit import JITFunction

from tests.tools.ptx import launches
from tests.tools.ptx.machine import Kernel
from tests.tools.ptx.parser import Unsupported

# A mutant is stopped after so many times the kernel's own number of instructions.
_LIMIT = 20


@dataclass(frozen=True)
class Mutation:
    """``harmless``: why a mutant may rightly go unnoticed, if known."""

    name: str
    pattern: str
    replacement: str | Callable[[re.Match[str]], str] = ""
    harmless: str = ""


def _one_more(found: re.Match[str]) -> str:
    return f"{found[1]}{int(found[2]) + 1};"


def _halved(found: re.Match[str]) -> str:
    return f"{found[1]}{int(found[2]) // 2};"


def _other_bit(bit: int) -> Callable[[re.Match[str]], str]:
    return lambda found: f"{found[1]}{int(found[2]) ^ bit}{found[3]}"


MUTATIONS = [
    Mutation(
        "bar.sync deleted",
        r"bar\.sync[^;]*;",
        harmless="Triton sets more than it needs: around what one thread alone does, to set up "
        "mbarriers and to issue bulk copies; before the end; between the parts of a reduction that "
        "one warp makes alone; on the way out of a loop.",
    ),
    Mutation(
        "bar.warp.sync deleted",
        r"bar\.warp\.sync[^;]*;",
        harmless="where another barrier follows before the warp's lanes read what others wrote.",
    ),
    Mutation(
        "cp.async.wait_group deleted",
        r"cp\.async\.wait_group[^;]*;",
        harmless="a later wait is reached before anything reads, as on the way out of a loop.",
    ),
    Mutation(
        "cp.async.wait_group one later",
        r"(cp\.async\.wait_group\s+)(\d+);",
        _one_more,
        harmless="the group that may now be under way is an empty one, of a tile past the end.",
    ),
    Mutation(
        "cp.async.commit_group deleted",
        r"cp\.async\.commit_group;",
        harmless="the copies join the next group; where the wait covers that one too, or the group "
        "was empty, nothing changes.",
    ),
    Mutation(
        "wgmma.wait_group deleted",
        r"wgmma\.wait_group\.sync\.aligned\s+\d+;",
        harmless="it lets one or two groups go on, and the loop has no more turns than that.",
    ),
    Mutation(
        "wgmma.commit_group deleted",
        r"wgmma\.commit_group\.sync\.aligned;",
        harmless="the products join the next group, and the loop ends before it matters.",
    ),
    Mutation(
        "wgmma.fence deleted",
        r"wgmma\.fence\.sync\.aligned;",
        harmless="behind another fence, of accumulators that nothing has touched yet.",
    ),
    Mutation(
        "fence.proxy.async deleted",
        r"fence\.proxy\.async[.:\w]*;",
        harmless="behind another one, with no store to shared memory between but by cp.async.",
    ),
    Mutation("mbarrier waited for once", r"@!complete bra\.uni waitLoop;"),
    Mutation(
        "bulk.wait_group deleted",
        r"cp\.async\.bulk\.wait_group\.read\s+0;",
        harmless="nothing was stored before it yet.",
    ),
    Mutation("expect_tx halved", r"(mbarrier\.arrive\.expect_tx[^;]*, )(\d+);", _halved),
    Mutation(
        "load without its mask",
        r"@%p\d+ (ld\.global)",
        r"\1",
        harmless="every lane is inside at the sizes of the test, or reads another row of the same "
        "storage, whose values are not used.",
    ),
    Mutation(
        "store without its mask",
        r"@%p\d+ (st\.global)",
        r"\1",
        harmless="every lane is inside at the sizes of the test, or writes the value that another "
        "lane writes there too.",
    ),
    Mutation(
        "copy of another size",
        r"(cp\.async\.c[ag]\.shared\.global[^;]*), %r\d+;",
        r"\1, 0x4;",
        harmless="of 4 bytes, all of which are inside.",
    ),
    Mutation(
        "shuffle of another distance",
        r"(shfl\.sync\.bfly\.b32[^;]*, )(\d+)(, 31, -1;)",
        _other_bit(1),
        harmless="the lanes hold copies of one value; or distances 3 and 1 reach the same four "
        "lanes as 2 and 1, whose maximum does not depend on the order.",
    ),
    Mutation(
        "another swizzle",
        r"(xor\.b32\s+%r\d+, %r\d+, )(\d+)(;)",
        _other_bit(16),
        harmless="where a store and the loads of what it stored both take their address from it.",
    ),
    Mutation(
        "ldmatrix not transposed",
        r"\.trans\.shared",
        ".shared",
        harmless="of a part of the tile that lies past the edge.",
    ),
    Mutation(
        "add becomes sub",
        r"add\.f32",
        "sub.f32",
        harmless="the second term is the constant 0, or the sum belongs to a row past the end.",
    ),
]


@dataclass
class Recording:
    """A launch that was run, and everything needed to run it again."""

    kernel: Kernel
    grid: tuple[int, ...]
    parameters: launches.Parameters
    before: list[bytes]
    after: list[bytes]
    lines: set[int]  # executed PTX lines

    def restore(self) -> None:
        for (start, size), data in zip(self.parameters.storages(), self.before, strict=True):
            ctypes.memmove(start, data, size)

    def replay(self, ptx: str) -> set[str]:
        """Kinds of the mutant's findings, or "result" if it has none but other results; empty if
        nothing was noticed."""
        self.restore()
        try:
            mutant = Kernel(ptx, self.kernel.num_warps, self.kernel.shared_bytes)
        except Unsupported:
            return {"unsupported"}
        limit = _LIMIT * self.kernel.executed
        data, storages = bytes(self.parameters.data), self.parameters.storages()
        findings = mutant.run(self.grid, data, storages, instruction_limit=limit)
        if findings:
            return {finding.kind for finding in findings}
        return set() if _contents(storages) == self.after else {"result"}


def _contents(storages: list[tuple[int, int]]) -> list[bytes]:
    return [ctypes.string_at(start, size) for start, size in storages]


def record(capability: int, run: Callable[[], Any]) -> list[Recording]:
    """Record the launches of ``run()``, each program once."""
    recordings: dict[str, Recording] = {}

    def record_launch(
        kernel: JITFunction, args: tuple, kwargs: dict, grid: Any, capability: int
    ) -> None:
        prepared = launches.prepare_launch(kernel, args, kwargs, grid, capability)
        before = _contents(prepared.parameters.storages())
        prepared.run()
        machine_kernel = prepared.kernel
        recordings.setdefault(
            machine_kernel.ptx,
            Recording(
                machine_kernel, prepared.grid, prepared.parameters, before,
                _contents(prepared.parameters.storages()), machine_kernel.executed_lines(),
            ),
        )  # fmt: skip

    with launches.compiled_for(capability, record_launch):
        run()
    return list(recordings.values())


@dataclass
class Score:
    """For one mutation of one kernel: number of mutants, and how they were noticed."""

    mutants: int = 0
    noticed: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    unnoticed: list[str] = field(default_factory=list)  # places


def _mutants(recording: Recording, mutation: Mutation, most: int) -> Iterator[tuple[str, str]]:
    """(PTX, place of change) for up to ``most`` evenly spaced executed instructions."""
    ptx = recording.kernel.ptx
    places = [
        found
        for found in re.finditer(mutation.pattern, ptx)
        if ptx.count("\n", 0, found.start()) + 1 in recording.lines
    ]
    chosen = {
        round(k * (len(places) - 1) / max(1, most - 1)) for k in range(min(most, len(places)))
    }
    for k in sorted(chosen):
        found = places[k]
        new = (
            found.expand(mutation.replacement)
            if isinstance(mutation.replacement, str)
            else mutation.replacement(found)
        )
        line = ptx.count("\n", 0, found.start()) + 1
        where = f"{recording.kernel.name}, PTX line {line}: {found[0]}"
        yield ptx[: found.start()] + new + ptx[found.end() :], where


def scores(recordings: list[Recording], most: int) -> dict[tuple[str, str], Score]:
    """(kernel, mutation) → score of up to ``most`` mutants."""
    out: dict[tuple[str, str], Score] = {}
    for recording in recordings:
        for mutation in MUTATIONS:
            score = out.setdefault((recording.kernel.name, mutation.name), Score())
            for ptx, where in _mutants(recording, mutation, most):
                kinds = recording.replay(ptx)
                score.mutants += 1
                score.noticed += bool(kinds)
                score.kinds.update(kinds)
                if not kinds:
                    score.unnoticed.append(where)
        recording.restore()
    return {key: score for key, score in out.items() if score.mutants}
