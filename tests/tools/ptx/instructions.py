"""Translates accepted instructions for the machine: operations, operands, immediates."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.tools.ptx.forms import WGMMA_SHAPE, modifiers
from tests.tools.ptx.parser import SIZES, Program, Statement, Unsupported

SPECIAL_REGISTERS = [
    "%tid.x", "%tid.y", "%tid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%ntid.x", "%ntid.y",
    "%ntid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%cluster_ctarank",
]  # fmt: skip

ELEMENT_TYPES = ["f16", "bf16", "tf32", "e4m3", "e5m2"]

_PREDICATE, _WORD, _DOUBLE = range(3)


def _kind(type: str) -> int:
    return _PREDICATE if type == "pred" else _DOUBLE if SIZES[type] == 8 else _WORD


# Operation, operands, immediates
Step = tuple[str, list[int], tuple[int, ...]]


@dataclass
class Row:
    """One step of the machine. ``target``: a branch's destination, else -1."""

    operation: str
    operands: list[int]
    immediates: tuple[int, ...]
    guard: int
    negated: bool
    target: int
    statement: Statement


@dataclass
class Translation:
    rows: list[Row] = field(default_factory=list)
    # kind, whether constant, value
    registers: list[tuple[int, int, int]] = field(default_factory=list)
    # smallest access, in bytes, to shared memory and to tensors
    shared_granule: int = 8
    global_granule: int = 8


def translate(program: Program) -> Translation:
    translator = _Translator(program)
    starts = []
    out = translator.out
    for statement in program.statements:
        starts.append(len(out.rows))
        try:
            steps = translator.steps(statement)
            guard = -1 if statement.guard is None else statement.scope[statement.guard]
        except Unsupported as e:
            raise Unsupported(f"{program.name}: {e} (line {statement.line})") from None
        except (KeyError, IndexError, ValueError) as e:
            message = f"{program.name}: {statement.text!r} (line {statement.line}): {e!r}"
            raise Unsupported(message) from e
        for operation, operands, immediates in steps:
            out.rows.append(
                Row(operation, operands, immediates, guard, statement.negated, -1, statement)
            )
    starts.append(len(out.rows))
    for row in out.rows:
        if row.statement.opcode.startswith("bra"):
            row.target = starts[row.statement.scope[row.statement.operands[0] + ":"]]
    return out


class _Translator:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.out = Translation(registers=[(_kind(type), 0, 0) for type in program.registers])
        self._constants: dict[tuple[int, int], int] = {}

    def steps(self, statement: Statement) -> list[Step]:
        base, words = modifiers(statement.opcode)
        self.scope = statement.scope
        handler: Callable[..., list[Step]] = getattr(self, f"_{base}", self._elementwise)
        return handler(base, words, list(statement.operands))

    # ------------------------------------------------------------------------------ operands

    def _new_register(self, kind: int, constant: int | None = None) -> int:
        self.out.registers.append((kind, int(constant is not None), constant or 0))
        return len(self.out.registers) - 1

    def _constant(self, kind: int, value: int) -> int:
        key = kind, value & (2**64 - 1 if kind == _DOUBLE else 2**32 - 1)
        if key not in self._constants:
            self._constants[key] = self._new_register(*key)
        return self._constants[key]

    def _register(self, name: str, type: str, narrower: bool = False) -> int:
        """``narrower``: the register may be wider than the type, as in ld and st."""
        register = self.scope[name]
        declared = self.program.registers[register]
        if "pred" in (declared, type):
            fits = declared == type
        else:
            size = SIZES[type]
            fits = SIZES[declared] == size or (
                SIZES[declared] > size and (narrower or (size == 1 and SIZES[declared] < 8))
            )
        if not fits:
            raise Unsupported(f"{name}, a register of {declared}, as an operand of {type}")
        return register

    def _value(self, text: str, type: str, narrower: bool = False) -> int:
        """The register of an operand; immediates get a constant register."""
        kind = _kind(type)
        if text == "_":
            return self._new_register(kind)
        if found := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
            return self._constant(kind, int(found[1], 16))
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return self._constant(kind, int(text.rstrip("U"), 0))
        if text in ("true", "false"):
            return self._constant(kind, int(text == "true"))
        if text in self.program.shared:
            return self._constant(kind, 0)
        return self._register(text, type, narrower)

    def _address(self, text: str) -> tuple[int, int]:
        """[register + offset] → register, offset."""
        found = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
        if not found:
            raise Unsupported(f"address {text}")
        offset = int(found[2] or "0", 0)
        if found[1] in self.program.shared:
            return self._constant(_WORD, 0), offset
        if found[1].isdigit():
            return self._constant(_WORD, int(found[1])), offset
        return self.scope[found[1]], offset

    def _values(self, texts: Sequence[str], *types: str) -> list[int]:
        return [self._value(text, type) for text, type in zip(texts, types, strict=True)]

    # -------------------------------------------------------------- arithmetic, bits and moves

    def _elementwise(self, base: str, words: Sequence[str | None], args: list[str]) -> list[Step]:
        *given, type = (word for word in words if word)
        given.sort(key="ftz".__eq__)  # the machine's names have it before the type
        types = [type] * len(args)
        if base in ("shl", "shr"):
            types[2] = "u32"
        elif base in ("bfe", "bfi"):
            types[-2:] = ["u32", "u32"]
        elif "wide" in given:
            wide = f"b{16 * SIZES[type]}"
            types = [wide, type, type, wide][: len(args)]
        return [(".".join([base, *given, type]), self._values(args, *types), ())]

    def _lop3(self, base: str, words: Sequence[str], args: list[str]) -> list[Step]:
        return [("lop3.b32", self._values(args[:4], *["b32"] * 4), (int(args[4], 0),))]

    def _cvta(self, base: str, words: Sequence[str], args: list[str]) -> list[Step]:
        name = "parameter_address" if "param" in words else "mov.b64"
        return [(name, self._values(args, "b64", "b64"), ())]

    def _mov(self, base: str, words: Sequence[str], args: list[str]) -> list[Step]:
        (type,) = words
        to, source = args
        if source in SPECIAL_REGISTERS:
            register = self._value(to, type)
            return [("special_register", [register], (SPECIAL_REGISTERS.index(source),))]
        if source in self.program.parameters:  # its offset, of which cvta makes an address
            offset, _ = self.program.parameters[source]
            constant = self._constant(_kind(type), offset)
            return [(f"mov.b{8 * SIZES[type]}", [self._value(to, type), constant], ())]
        if type == "pred":
            return [("mov.pred", self._values(args, type, type), ())]
        packed = to if to.startswith("{") else source if source.startswith("{") else None
        if packed is None:
            return [(f"mov.b{8 * SIZES[type]}", self._values(args, type, type), ())]
        names = _elements(packed)
        size = SIZES[type] // len(names)
        parts = [self._value(name, f"b{8 * size}") for name in names]
        if packed is to:
            return [("unpack", [*parts, self._value(source, type)], (size,))]
        return [("pack", [self._value(to, type), *parts], (size,))]

    def _selp(self, base: str, words: Sequence[str], args: list[str]) -> list[Step]:
        (type,) = words
        return [(f"selp.b{8 * SIZES[type]}", self._values(args, type, type, type, "pred"), ())]

    def _setp(self, base: str, words: Sequence[str | None], args: list[str]) -> list[Step]:
        compare, *combine, type = words
        assert compare and type
        results = [self._value(name, "pred") for name in _pair(args[0])]
        operands = self._values(args[1:3], type, type)
        if type.endswith("x2"):
            return [(f"setp.{compare}.{type}", [*results, *operands], ())]
        if type in ("b16", "b32", "b64"):
            type = f"u{type[1:]}"
        steps: list[Step] = [(f"setp.{compare}.{type}", [results[0], *operands], ())]
        if combine[0]:
            if len(results) > 1:
                raise Unsupported(f"setp with two results and .{combine[0]}")
            other = self._value(args[3], "pred")
            steps.append((f"{combine[0]}.pred", [results[0], results[0], other], ()))
        elif len(results) > 1:
            steps.append(("not.pred", [results[1], results[0]], ()))
        return steps

    def _cvt(self, base: str, words: Sequence[str], args: list[str]) -> list[Step]:
        to, source = words[-2:]
        packed = {"e4m3x2": "b16", "e5m2x2": "b16", "tf32": "b32"}
        type = packed.get(source, source)
        result = self._value(args[0], packed.get(to, to))
        operands = [self._value(arg, type, narrower=True) for arg in args[1:]]
        steps: list[Step] = []
        if self.out.registers[operands[0]][0] != _kind(type):  # take a wider register's low part
            low = self._new_register(_WORD)
            steps.append(("cvt.u32.u64", [low, operands[0]], ()))
            operands = [low]
        return [*steps, (".".join(["cvt", *words]), [result, *operands], ())]

    # -------------------------------------------------------------------------------- memory

    def _createpolicy(self, base: str, words: Sequence[str], args: list[str]) -> list[Step]:
        zero = self._constant(_WORD, 0)  # ignored by all accesses
        return [("mov.b64", [self._value(args[0], "b64"), zero], ())]

    def _ld(self, base: str, words: Sequence[str | None], args: list[str]) -> list[Step]:
        space, vector, type = words
        assert space and type
        registers = [self._value(name, type, narrower=True) for name in _elements(args[0])]
        if len(registers) != int((vector or "v1")[1:]):
            raise Unsupported(f"{len(registers)} registers of ld.{vector}")
        if space == "param":
            found = re.fullmatch(r"\[\s*(\w+)\s*(?:\+\s*(\d+))?\s*\]", args[1])
            if not found:
                raise Unsupported(f"address {args[1]} of ld.param")
            address = self._constant(_WORD, 0)
            offset = self.program.parameters[found[1]][0] + int(found[2] or 0)
        else:
            address, offset = self._address(args[1])
        return self._access(f"ld.{space}", registers, address, offset, type)

    def _st(self, base: str, words: Sequence[str | None], args: list[str]) -> list[Step]:
        space, vector, type = words
        assert space and type
        registers = [self._value(name, type, narrower=True) for name in _elements(args[1])]
        if len(registers) != int((vector or "v1")[1:]):
            raise Unsupported(f"{len(registers)} registers of st.{vector}")
        return self._access(f"st.{space}", registers, *self._address(args[0]), type)

    def _access(
        self, name: str, registers: list[int], address: int, offset: int, type: str
    ) -> list[Step]:
        size = SIZES[type]
        if name.endswith("shared"):
            self._touches_shared(size)
        elif name.endswith("global"):
            self.out.global_granule = min(self.out.global_granule, size)
        return [(name, [*registers, address], (offset, size, len(registers), int(type[0] == "s")))]

    def _touches_shared(self, size: int) -> None:
        self.out.shared_granule = min(self.out.shared_granule, size)

    def _matrices(self, base: str, words: Sequence[str | None], args: list[str]) -> list[Step]:
        registers, memory = args if base == "ldmatrix" else reversed(args)
        address, offset = self._address(memory)
        self._touches_shared(2)
        operands = [self._value(name, "b32") for name in _elements(registers)]
        return [(base, [*operands, address], (offset, int("trans" in words)))]

    _ldmatrix = _stmatrix = _matrices

    def _cp(self, base: str, words: Sequence[str | None], args: list[str]) -> list[Step]:
        if "tensor" in words:
            return self._bulk_tensor(words, args)
        if "bulk" in words:
            return [(f"bulk.{words[-1]}", [], tuple(int(arg) for arg in args))]
        if words[-1] != "global":
            return [(f"cp.async.{words[-1]}", [], tuple(int(arg) for arg in args))]
        to, to_offset = self._address(args[0])
        source, source_offset = self._address(args[1])
        fetched = [self._value(arg, "b32") for arg in args[3:4]]
        self._touches_shared(4)
        return [("cp.async", [to, source, *fetched], (to_offset, source_offset, int(args[2], 0)))]

    def _bulk_tensor(self, words: Sequence[str | None], args: list[str]) -> list[Step]:
        loads = words[-1] == "mbarrier::complete_tx::bytes"
        memory, tensor = args[:2] if loads else (args[1], args[0])
        found = re.fullmatch(r"\[\s*([%\w]+)\s*,\s*(\{.*\})\s*\]", tensor)
        if not found or len(args) != (3 if loads else 2):
            raise Unsupported(f"operands {args} of a bulk copy")
        address, offset = self._address(memory)
        tensor_map = self._register(found[1], "b64")
        coordinates = [self._value(name, "b32") for name in _elements(found[2])]
        self._touches_shared(4)
        if not loads:
            return [("bulk.store", [tensor_map, address, *coordinates], (offset,))]
        barrier, barrier_offset = self._address(args[2])
        operands = [address, tensor_map, barrier, *coordinates]
        return [("bulk.load", operands, (offset, barrier_offset))]

    # --------------------------------------------------------------------- lanes, tensor cores

    def _shfl(self, base: str, words: Sequence[str], args: list[str]) -> list[Step]:
        mode = ["idx", "bfly", "up", "down"].index(words[1])
        value, *inside = _pair(args[0])
        results = [self._value(value, "b32"), *(self._value(name, "pred") for name in inside)]
        operands = self._values(args[1:], *["b32"] * 4)
        return [("shfl", [*results, *operands], (mode, len(inside)))]

    def _vote(self, base: str, words: Sequence[str], args: list[str]) -> list[Step]:
        return [(f"vote.{words[1]}", self._values(args, words[2], "pred", "b32"), ())]

    def _elect(self, base: str, words: Sequence[str], args: list[str]) -> list[Step]:
        results = self._values(_pair(args[0]), "b32", "pred")
        return [("elect", [*results, self._value(args[1], "b32")], ())]

    def _redux(self, base: str, words: Sequence[str], args: list[str]) -> list[Step]:
        return [(f"redux.{words[1]}.{words[2]}", self._values(args, *["b32"] * 3), ())]

    def _mma(self, base: str, words: Sequence[str], args: list[str]) -> list[Step]:
        type, k = words[6], int(words[2].partition("k")[2])
        names = [name for arg in args for name in _elements(arg)]
        operands = [self._value(name, "b32") for name in names]
        return [("mma", operands, (ELEMENT_TYPES.index(type), k))]

    def _wgmma(self, base: str, words: Sequence[str], args: list[str]) -> list[Step]:
        if words[0] != "mma_async":
            return [(f"wgmma.{words[0]}", [], tuple(int(arg) for arg in args))]
        shape = WGMMA_SHAPE.fullmatch(words[3])
        assert shape
        n, k, type = int(shape[1]), int(shape[2]), words[5]
        if words[6] != type:
            raise Unsupported(f"wgmma of {type} with {words[6]}")
        d, a, b, scale, *rest = args
        results = [self._value(name, "b32") for name in _elements(d)]
        if len(results) != n // 2 or rest[:2] != ["1", "1"]:
            raise Unsupported(f"operands of wgmma: {len(results)} registers, signs {rest[:2]}")
        transposed = [int(x) for x in rest[2:]]
        in_registers = a.startswith("{")
        operands = [self._value(name, "b32" if in_registers else "b64") for name in _elements(a)]
        operands.append(self._value(b, "b64"))
        if in_registers:
            flags = 1 | 4 * sum(transposed)
        else:
            flags = 2 * transposed[0] | 4 * transposed[1] if transposed else 0
        if scale.lstrip("-").isdigit():
            flags |= 8 * (int(scale) == 0)
        else:
            flags |= 16
            operands.append(self._value(scale, "pred"))
        self._touches_shared(4)
        immediates = (ELEMENT_TYPES.index(type), n, flags, k)
        return [("wgmma", [*results, *operands], immediates)]

    # ----------------------------------------------------------------------- control and order

    def _bra(self, base: str, words: Sequence[str], args: list[str]) -> list[Step]:
        return [("nop", [], ())]

    def _ret(self, base: str, words: Sequence[str], args: list[str]) -> list[Step]:
        return [("trap" if base == "trap" else "ret", [], ())]

    _exit = _trap = _ret

    def _bar(self, base: str, words: Sequence[str], args: list[str]) -> list[Step]:
        if words[0] == "warp":
            return [("bar.warp.sync", [self._value(args[0], "b32")], ())]
        return [("bar.sync", [self._value(arg, "b32") for arg in args], ())]

    _barrier = _bar

    def _fence(self, base: str, words: Sequence[str], args: list[str]) -> list[Step]:
        return [("fence.proxy.async", [], ())]

    def _mbarrier(self, base: str, words: Sequence[str], args: list[str]) -> list[Step]:
        if words[0] in ("try_wait", "test_wait"):
            address, offset = self._address(args[1])
            parity = self._value(args[2], "b32")
            operands = [self._value(args[0], "pred"), address, parity]
            return [("mbarrier.try_wait", operands, (offset,))]
        if not args[0].startswith("["):  # the state returned by an arrival
            if args.pop(0) != "_":
                raise Unsupported("the state of an mbarrier")
        address, offset = self._address(args[0])
        operands = [address, *(self._value(arg, "b32") for arg in args[1:])]
        if words[0] == "arrive":
            expects = "expect_tx" in words
            if len(operands) != 1 + expects:
                raise Unsupported("mbarrier.arrive with a count")
            return [("mbarrier.arrive", operands, (offset, int(expects)))]
        return [(f"mbarrier.{words[0]}", operands, (offset,))]


def _elements(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{}").split(",")]


def _pair(text: str) -> list[str]:
    return [name.strip() for name in text.split("|")]
