"""NVIDIA machine code (SASS) as text: its instructions, what kind each is, and its loops."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import triton

_NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"

# Kind of instruction → the beginning of its opcode. The first that fits counts.
_KINDS = {
    "HGMMA": r"[HIQB]GMMA",  # wgmma: tensor cores of sm_90 from shared memory
    "TC5MMA": r"UTC\w*MMA",  # tcgen05: tensor cores of sm_100
    "HMMA": r"[HIDQO]MMA",  # tensor cores from the registers of a warp
    "LDGSTS": r"LDGSTS",  # cp.async: global to shared memory, past the registers
    "TMA_LOAD": r"UTMALDG|UBLKCP",  # tensor memory accelerator
    "TMA_STORE": r"UTMASTG|UTMAREDG",
    "TMEM": r"LDTM|STTM|UTCCP",  # tensor memory of sm_100
    "LOCAL": r"LDL|STL",  # local memory, where spilled registers and arrays go
    "MUFU": r"MUFU",  # exp2, reciprocal, ...
    "FP32X2": r"F(FMA|MUL|ADD)2",
    "FP32": r"F(FMA|MUL|ADD)(32I)?\b",
    "COMPARE": r"FMNMX|FSETP|FSEL|FSET|FCHK",
    "CONVERT": r"F2F|F2I|I2F|FRND",
    "HALF": r"H(FMA|ADD|MUL|MNMX)2|HSETP|HSET",
    "LDG": r"LDG\b|LD\b",
    "STG": r"STG\b|ST\b",
    "ATOMIC": r"ATOM|RED\b|REDG",
    "LDSM": r"LDSM|STSM",
    "LDS": r"LDS\b",
    "STS": r"STS\b",
    "SHUFFLE": r"SHFL|REDUX",
    "BARRIER": r"BAR|SYNCS|WARP|BSYNC|BSSY|DEPBAR|LDGDEPBAR|MEMBAR|FENCE|ELECT|CCTL|UCGABAR",
    "BRANCH": r"BRA|EXIT|CALL|RET|BRX|JMP|BREAK",
    "IMAD": r"IMAD",  # integer products, and moves by them
    "UNIFORM": r"U|R2UR|S2|CS2R|VOTE|NOP|R2P|P2R|LDC",
}
_KIND = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _KINDS.items()))

MATRIX = ("HGMMA", "TC5MMA", "HMMA")

# "        /*0a10*/              @!P0 BRA `(.L_x_1) ;"
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"([.$\w]+):\s*$")


@dataclass(frozen=True)
class Instruction:
    opcode: str  # "LDG.E.128"
    operands: str
    predicated: bool

    @property
    def kind(self) -> str:
        """One of the names above, or "INTEGER": integer and logic operations, moves."""
        found = _KIND.match(self.opcode)
        return str(found.lastgroup) if found else "INTEGER"

    def macs(self) -> int:
        """Multiply-adds of a matrix product, by a warp (HMMA) or four (HGMMA); tcgen05's code
        does not say them."""
        if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", self.opcode):
            return int(found[1]) * int(found[2]) * int(found[3])
        if found := re.match(r"HMMA\.16(8)(\d+)", self.opcode):  # .16816: 16 x 8 x 16
            return 16 * int(found[1]) * int(found[2])
        return 0


def kinds(instructions: Iterable[Instruction]) -> Counter[str]:
    return Counter(instruction.kind for instruction in instructions)


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, without the functions it calls, and its innermost loops."""

    instructions: list[Instruction]
    loops: list[list[Instruction]]

    def main_loop(self) -> list[Instruction]:
        """The loop with the matrix products; of several that have about as many, the shortest,
        which masks nothing. Without products, the longest. Without a loop, all instructions."""
        if not self.loops:
            return self.instructions

        def products(loop: list[Instruction]) -> int:
            counts = kinds(loop)
            return sum(counts[name] for name in MATRIX)

        most = max(map(products, self.loops))
        if most == 0:
            return max(self.loops, key=len)
        return min((loop for loop in self.loops if products(loop) >= 0.9 * most), key=len)


def disassemble(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [_NVDISASM, "--print-code", "--no-dataflow", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    return parse(listing)


@dataclass
class _Block:
    """Instructions that run one after the other."""

    instructions: list[Instruction]
    follows: bool  # whether the block behind it may run next
    target: str | None = None  # the label that may run next


def parse(listing: str) -> Code:
    """What nvdisasm printed."""
    blocks: list[_Block] = []
    labels: dict[str, int] = {}
    begins = True  # with the next instruction
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            if label[1].startswith("$"):  # a function that the kernel calls
                break
            labels[label[1]] = len(blocks)
            begins = True
        elif found := _INSTRUCTION.match(line):
            instruction = Instruction(found[2], found[3], found[1] is not None)
            if begins:
                blocks.append(_Block([], follows=True))
            blocks[-1].instructions.append(instruction)
            begins = _ends_block(blocks[-1], instruction)
    if not blocks:
        raise RuntimeError(f"nvdisasm listed no instructions:\n{listing[:1000]}")
    every = [instruction for block in blocks for instruction in block.instructions]
    return Code(every, [_instructions(blocks, loop) for loop in _innermost(blocks, labels)])


def _ends_block(block: _Block, last: Instruction) -> bool:
    name = last.opcode.partition(".")[0]
    if name == "BRA":
        # "BRA `(.L_x_1)", conditional if there is another operand: "BRA.U UP0, `(.L_x_1)"
        target = re.search(r"`\((\S+)\)", last.operands)
        block.target = target[1] if target else None
        block.follows = last.predicated or "," in last.operands
    elif name in ("EXIT", "RET"):
        block.follows = last.predicated
    return name in ("BRA", "EXIT", "RET")


def _instructions(blocks: list[_Block], chosen: set[int]) -> list[Instruction]:
    return [instruction for i in sorted(chosen) for instruction in blocks[i].instructions]


def _innermost(blocks: list[_Block], labels: dict[str, int]) -> list[set[int]]:
    """The natural loops that hold no other, by dominators, so that blocks which the assembler moved
    behind the kernel's end are found. A loop that only waits, for a memory barrier say, is none: it
    is part of the loop around it."""
    successors = [_successors(i, block, labels, len(blocks)) for i, block in enumerate(blocks)]
    predecessors: list[list[int]] = [[] for _ in blocks]
    for i, following in enumerate(successors):
        for j in following:
            predecessors[j].append(i)
    dominators = _dominators(successors, predecessors)

    loops: dict[int, set[int]] = {}
    for tail, above in dominators.items():
        for head in successors[tail]:
            if head in above:  # the edge goes back
                body = loops.setdefault(head, {head})
                todo = [tail]
                while todo:
                    i = todo.pop()
                    if i not in body:
                        body.add(i)
                        todo += [j for j in predecessors[i] if j in dominators]

    working = {h: b for h, b in loops.items() if not _waits(_instructions(blocks, b))}
    return [
        body
        for head, body in sorted(working.items())
        if not any(other != head and inner < body for other, inner in working.items())
    ]


def _waits(loop: list[Instruction]) -> bool:
    return kinds(loop).keys() <= {"BARRIER", "BRANCH", "UNIFORM", "INTEGER", "IMAD"}


def _successors(i: int, block: _Block, labels: dict[str, int], count: int) -> list[int]:
    found = [labels[block.target]] if block.target in labels else []
    return found + ([i + 1] if block.follows and i + 1 < count else [])


def _dominators(successors: list[list[int]], predecessors: list[list[int]]) -> dict[int, set[int]]:
    """Block that can run → the blocks that every way to it passes, itself included."""
    order, stack, seen = list[int](), [(0, iter(successors[0]))], {0}
    while stack:
        block, rest = stack[-1]
        following = next((j for j in rest if j not in seen), None)
        if following is None:
            order.append(stack.pop()[0])
        else:
            seen.add(following)
            stack.append((following, iter(successors[following])))
    order.reverse()
    dominators = {block: set(order) for block in order}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            ways = [dominators[p] for p in predecessors[block] if p in dominators]
            new = set.intersection(*ways) | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators
