"""Parses a kernel's PTX: registers, parameters, instructions."""

from __future__ import annotations

import bisect
import re
from collections import ChainMap
from dataclasses import dataclass, field

SIZES = {
    **dict.fromkeys(("b8", "s8", "u8"), 1),
    **dict.fromkeys(("b16", "s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "s32", "u32", "f32", "f16x2", "bf16x2"), 4),
    **dict.fromkeys(("b64", "s64", "u64", "f64"), 8),
}


class Unsupported(Exception):
    """Names code that the machine cannot execute."""


@dataclass
class Statement:
    """One instruction. ``scope``: registers by name, and labels as "name:"."""

    opcode: str
    operands: list[str]
    guard: str | None
    negated: bool
    scope: ChainMap[str, int]
    line: int
    source: str  # file:line of the kernel
    text: str


@dataclass
class Program:
    name: str = ""
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset, bytes
    parameter_bytes: int = 0
    registers: list[str] = field(default_factory=list)  # types
    shared: set[str] = field(default_factory=set)  # names of the single block of shared memory
    statements: list[Statement] = field(default_factory=list)


_TOKEN = re.compile(
    r"""\s*(?:
      \.loc[ \t][^\n]*?(?://[ \t]*(?P<source>\S+:\d+):\d+[^\n]*)?\n
    | //[^\n]*
    | (?P<brace>[{}])
    | (?P<label>[$\w]+):(?!:)
    | (?P<statement>[^;{}\s](?:[^;])*);
    )""",
    re.VERBOSE,
)
# Within inline assembly LLVM's line numbers count on from the kernel's line that contains it.
_ASSEMBLY = re.compile("// begin inline asm.*?// end inline asm", re.DOTALL)
_OPERAND = re.compile(r"\{[^{}]*\}|\[(?:[^\[\]{}]|\{[^{}]*\})*\]|[^,\s|]+(?:\s*\|\s*[^,\s|]+)?")
_PARAMETER = re.compile(
    r"""\.param\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)
        (?:\s+\.ptr(?:\s+\.\w+)*(?:\s+\.align\s+\d+)?)?\s+(?P<name>\w+)(?:\[(?P<count>\d+)\])?""",
    re.VERBOSE,
)
_INSTRUCTION = re.compile(
    r"(?:@(?P<negated>!?)\s*(?P<guard>[%\w]+)\s+)?(?P<opcode>\S+)\s*(?P<operands>.*)", re.DOTALL
)


def parse(ptx: str) -> Program:
    """Parse a module of a single kernel."""
    program = Program()
    ptx = _ASSEMBLY.sub(lambda found: found[0].replace(".loc", "//"), ptx)
    head, found, rest = ptx.partition(".entry")
    if not found or ".entry" in rest or ".func" in ptx:
        raise Unsupported("a module of other than one kernel")
    for declared in re.finditer(r"\.shared\s[^;]*?\.b8\s+(\w+)\[(\d*)\]", head):
        if declared[2]:
            raise Unsupported(f"shared memory of a fixed size: {declared[0]}")
        program.shared.add(declared[1])
    name, _, rest = rest.partition("(")
    program.name = name.strip()
    parameters, _, rest = rest.partition(")")
    _add_parameters(program, parameters)
    start = ptx.index(rest) + rest.index("{")
    _add_body(program, ptx, start)
    return program


def _add_parameters(program: Program, text: str) -> None:
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        found = _PARAMETER.fullmatch(declaration)
        if not found:
            raise Unsupported(f"parameter {declaration!r}")
        size = SIZES[found["type"]]
        align, total = int(found["align"] or size), size * int(found["count"] or 1)
        offset = -(-program.parameter_bytes // align) * align
        program.parameters[found["name"]] = offset, total
        program.parameter_bytes = offset + total


def _add_body(program: Program, ptx: str, at: int) -> None:
    lines = [found.start() for found in re.finditer("\n", ptx)]
    scope: ChainMap[str, int] = ChainMap()
    depth, source = 0, ""
    while True:
        token = _TOKEN.match(ptx, at)
        if not token:
            raise Unsupported(f"PTX {ptx[at : at + 80].strip()!r}")
        at = token.end()
        if token["source"]:
            source = token["source"]
        elif token["brace"] == "{":
            scope, depth = scope.new_child(), depth + 1
        elif token["brace"]:
            scope, depth = scope.parents, depth - 1
            if depth == 0:
                return
        elif token["label"]:
            scope[token["label"] + ":"] = len(program.statements)
        elif token["statement"]:
            line = bisect.bisect(lines, token.start("statement")) + 1
            _add_statement(program, token["statement"].strip(), scope, line, source)


def _add_statement(
    program: Program, text: str, scope: ChainMap[str, int], line: int, source: str
) -> None:
    if text.startswith(".reg"):
        _, kind, names = text.split(None, 2)
        for name in (name.strip() for name in names.split(",")):
            numbered = re.fullmatch(r"([%\w]+?)<(\d+)>", name)
            every = [f"{numbered[1]}{k}" for k in range(int(numbered[2]))] if numbered else [name]
            for each in every:
                scope[each] = len(program.registers)
                program.registers.append(kind.removeprefix("."))
        return
    if text.startswith("."):
        if text.split()[0] != ".pragma":  # only for ptxas
            raise Unsupported(f"directive {text!r}")
        return
    found = _INSTRUCTION.fullmatch(text)
    assert found
    program.statements.append(
        Statement(
            opcode=found["opcode"],
            operands=_OPERAND.findall(found["operands"]),
            guard=found["guard"],
            negated=bool(found["negated"]),
            scope=scope,
            line=line,
            source=source,
            text=" ".join(text.split()),
        )
    )
