"""NVIDIA machine code (SASS) as text: its instructions, what kind each is, and its loops."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
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

# "        /*0a10*/              @!P0 BRA 0xb20 ;", from sm_120 on with notes: " &wr=0x1 ?trans1;"
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*(.*?)(?:\s+[&?][^;]*)?\s*;", re.M
)


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

    @property
    def target(self) -> int | None:
        """Where a branch goes to, or a call."""
        found = re.search(r"(?:^|\s)0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if found else None

    @property
    def ends_block(self) -> bool:
        return self.opcode.partition(".")[0] in ("BRA", "EXIT", "RET", "CALL")

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow. "BRA.U UP0, 0xb20" may, "BRA 0xb20" not."""
        condition = self.opcode.startswith("BRA") and "," in self.operands
        call = self.opcode.startswith("CALL")
        return not self.ends_block or self.predicated or condition or call

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


def disassemble(cubins: Sequence[bytes], capability: int) -> list[Code]:
    """The kernels' code. One run of nvdisasm for all: starting it takes as long as compiling."""
    texts = [_text(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(texts))
        file.flush()
        listing = subprocess.run(
            [_NVDISASM, "--binary", f"SM{capability}", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    instructions = _listed(listing)
    codes, start = [], 0
    for text in texts:
        stop = start + len(text)
        codes.append(_analyse({at: i for at, i in instructions.items() if start <= at < stop}))
        start = stop
    return codes


def parse(listing: str) -> Code:
    """Of one kernel, as nvdisasm lists raw code."""
    return _analyse(_listed(listing))


def _text(cubin: bytes) -> bytes:
    """The kernel's section of an ELF file: one, for Triton inlines what a kernel calls."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names = headers[of_names][4]
    found = [
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin.startswith(b".text.", names + name)
    ]
    if len(found) != 1:
        raise RuntimeError(f"the binary must have one section of code, it has {len(found)}")
    return found[0]


def _listed(listing: str) -> dict[int, Instruction]:
    """Address → instruction."""
    found = {
        int(at, 16): Instruction(opcode, operands, predicate != "")
        for at, predicate, opcode, operands in _INSTRUCTION.findall(listing)
    }
    if not found:
        raise RuntimeError(f"nvdisasm listed no instructions:\n{listing[:1000]}")
    return found


def _analyse(instructions: dict[int, Instruction]) -> Code:
    """What the kernel calls, traps of the system, lies behind it, behind a branch to itself, and is
    left out. A call of the kernel's own code is a jump: ptxas leaves loops that way."""
    last = min((at for at, i in instructions.items() if i.ends_block and i.target == at), default=0)
    called = [
        target
        for instruction in instructions.values()
        if instruction.opcode.startswith("CALL")
        and (target := instruction.target) is not None
        and target > last
    ]
    end = min(called, default=max(instructions) + 1)
    kernel = {at: instruction for at, instruction in instructions.items() if at < end}
    blocks = _blocks(kernel)
    loops = [
        [instruction for start in sorted(loop) for instruction in blocks[start].instructions]
        for loop in _innermost(blocks)
    ]
    return Code(list(kernel.values()), loops)


@dataclass
class _Block:
    """Instructions that run one after the other."""

    instructions: list[Instruction]
    successors: list[int]  # addresses of the blocks that may run next


def _blocks(instructions: dict[int, Instruction]) -> dict[int, _Block]:
    """By address, in order."""
    addresses = list(instructions)
    behind = dict(zip(addresses, addresses[1:], strict=False))
    starts = {addresses[0]}
    for at, instruction in instructions.items():
        if instruction.ends_block:
            next_ones = (instruction.target, behind.get(at))
            starts |= {start for start in next_ones if start in instructions}
    blocks: dict[int, _Block] = {}
    for at, instruction in instructions.items():
        if at in starts:
            start = at
            blocks[start] = _Block([], [])
        blocks[start].instructions.append(instruction)
        if behind.get(at) in starts or at not in behind:
            following = [instruction.target] if instruction.ends_block else []
            following += [behind.get(at)] if instruction.falls_through else []
            blocks[start].successors = [next for next in following if next in starts]
    return blocks


def _innermost(blocks: dict[int, _Block]) -> list[set[int]]:
    """The natural loops that hold no other, by dominators, so that blocks which the assembler moved
    behind the kernel's end are found. A loop that only waits, for a memory barrier say, is none: it
    is part of the loop around it."""
    predecessors: dict[int, list[int]] = {start: [] for start in blocks}
    for start, block in blocks.items():
        for next in block.successors:
            predecessors[next].append(start)
    dominators = _dominators(blocks, predecessors)

    loops: dict[int, set[int]] = {}
    for tail, above in dominators.items():
        for head in blocks[tail].successors:
            if head in above:  # the edge goes back
                body = loops.setdefault(head, {head})
                todo = [tail]
                while todo:
                    start = todo.pop()
                    if start not in body:
                        body.add(start)
                        todo += [p for p in predecessors[start] if p in dominators]

    working = [body for _, body in sorted(loops.items()) if not _waits(blocks, body)]
    return [body for body in working if not any(inner < body for inner in working)]


def _waits(blocks: dict[int, _Block], loop: set[int]) -> bool:
    found = kinds(instruction for start in loop for instruction in blocks[start].instructions)
    return found.keys() <= {"BARRIER", "BRANCH", "UNIFORM", "INTEGER", "IMAD"}


def _dominators(
    blocks: dict[int, _Block], predecessors: dict[int, list[int]]
) -> dict[int, set[int]]:
    """Block that can run → the blocks that every way to it passes, itself included."""
    root = next(iter(blocks))
    order, stack, seen = list[int](), [(root, iter(blocks[root].successors))], {root}
    while stack:
        block, rest = stack[-1]
        following = next((start for start in rest if start not in seen), None)
        if following is None:
            order.append(stack.pop()[0])
        else:
            seen.add(following)
            stack.append((following, iter(blocks[following].successors)))
    order.reverse()
    dominators = {block: set(order) for block in order}
    dominators[root] = {root}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            ways = [dominators[p] for p in predecessors[block] if p in dominators]
            new = set.intersection(*ways) | {block}
            if new != dominators[block]:
                dominators[block], changed = new, True
    return dominators
