"""The instructions that the machine executes, with their modifiers.

``FORMS`` lists every supported instruction with its modifiers in order:

- ``word``: required and significant (``a|b``: one of them);
- ``[word]``: optional and significant;
- ``(word)``: optional and without effect here: see the comment.

Any other instruction, modifier or combination raises ``Unsupported`` with its name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from tests.tools.ptx.parser import Unsupported

_INT = "s16|u16|s32|u32|s64|u64"
_INT8 = "s8|u8|" + _INT
_BITS = "b16|b32|b64"
_ANY = f"{_BITS}|{_INT}|f32|f64"
_HALF = "f16|f16x2|bf16|bf16x2"
_MEMORY = "b8|b16|b32|b64|s8|u8|s16|u16|s32|u32|s64|u64|f32|f64"
# Only affects speed. The last operand of an access with a cache hint is its policy.
_CACHE = "(L1::evict_first|L1::evict_last|L1::no_allocate) (L2::cache_hint)"
# Without a rounding modifier, instructions round to nearest even.
_FLOAT = ["(rn) [ftz] f32", "(rn) f64", f"(rn) {_HALF}"]
_EXTREME = [
    *(_INT, "relu s32", "[ftz] [NaN] f32", "ftz xorsign abs f32"),
    *(f"xorsign abs f32|{_HALF}", f"f64|{_HALF}"),
]
_SIGN = ["s16|s32|s64", "[ftz] f32", "f64", _HALF]
_ORDERED, _UNORDERED = "eq|ne|lt|le|gt|ge", "equ|neu|ltu|leu|gtu|geu|num|nan"

FORMS: dict[str, list[str]] = {
    # Arithmetic. ftz: subnormal operands and results are 0.
    "add": [_INT, *_FLOAT],
    "sub": [_INT, *_FLOAT],
    "mul": [f"lo|hi {_INT}", "wide s16|u16|s32|u32", *_FLOAT],
    "mad": [f"lo|hi {_INT}", "wide s32|u32"],
    "fma": ["(rn) [ftz] f32", "(rn) f64", f"(rn) {_HALF}"],
    "div": [_INT, "approx|full|rn [ftz] f32", "rn f64"],
    "rem": [_INT],
    # relu: clamped to at least 0. NaN: propagates NaN. xorsign.abs: of the magnitudes, with the
    # sign of the product.
    "min": _EXTREME,
    "max": _EXTREME,
    "neg": _SIGN,
    "abs": _SIGN,
    "sqrt": ["rn|approx [ftz] f32", "rn f64"],
    "rsqrt": ["approx [ftz] f32", "approx f64"],
    "rcp": ["rn|approx [ftz] f32", "approx ftz f64"],
    "ex2": ["approx [ftz] f32"],
    "lg2": ["approx [ftz] f32"],
    "tanh": ["approx f32"],
    "copysign": ["f32"],
    # Bits
    "and": ["pred", _BITS],
    "or": ["pred", _BITS],
    "xor": ["pred", _BITS],
    "not": ["pred", _BITS],
    "shl": [_BITS],
    "shr": [f"{_BITS}|{_INT}"],
    "bfe": ["u32|s32"],
    "bfi": ["b32"],
    "prmt": ["b32"],
    "popc": ["b32"],
    "clz": ["b32"],
    "lop3": ["b32"],
    "shf": ["l|r wrap b32"],  # wrap: shift distance modulo 32
    # Moves, comparisons, conversions
    "mov": [f"pred|{_ANY}"],
    # A global address is an address in memory, a parameter's is its offset.
    "cvta": ["(to) (global) u64", "param u64"],
    "selp": [_ANY],
    "setp": [
        f"{_ORDERED} [and|or|xor] {_BITS}|{_INT}",
        f"{_ORDERED}|{_UNORDERED} [and|or|xor] f32|f64|f16|bf16",
        f"{_ORDERED}|neu|nan f16x2|bf16x2",
    ],
    "cvt": [
        f"{_INT8} {_INT8}",
        f"rn f32|f64 {_INT8}",
        f"rzi|rni {_INT8} f32",
        f"rzi {_INT8} f64|f16|bf16",
        "f32|f64 f16|bf16",
        "f64 f32",
        "rn f32 f64",
        "rni|rzi|rmi|rpi f32 f32",
        "rn f16|bf16 f32|f64",
        "rn f16 bf16",
        "rn bf16 f16",
        "rz f16 f32",
        "rn f16x2|bf16x2 f32",
        "rna tf32 f32",
        "rn satfinite e4m3x2|e5m2x2 f32|f16x2",
        "rn f16x2 e4m3x2|e5m2x2",
    ],
    # Memory
    "createpolicy": ["(fractional) (L2::evict_first|L2::evict_last) b64"],
    "ld": [
        f"param [v2|v4] {_MEMORY}",
        f"global {_CACHE} [v2|v4|v8] {_MEMORY}",
        f"shared [v2|v4] {_MEMORY}",
    ],
    "st": [f"global {_CACHE} [v2|v4|v8] {_MEMORY}", f"shared [v2|v4] {_MEMORY}"],
    "ldmatrix": ["sync aligned m8n8 x1|x2|x4 [trans] shared b16"],
    "stmatrix": ["sync aligned m8n8 x1|x2|x4 [trans] shared b16"],
    "cp": [
        # ca, cg, L2::*: which caches keep the bytes
        "async (ca|cg) shared global (L2::cache_hint|L2::128B)",
        "async commit_group|wait_all",
        "async wait_group",
        # A cluster is a single CTA.
        "async bulk tensor 1d|2d|3d|4d|5d shared|shared::cluster global (tile) "
        "mbarrier::complete_tx::bytes",
        "async bulk tensor 1d|2d|3d|4d|5d global shared (tile) bulk_group",
        "async bulk commit_group",
        # read: waits only until the source may be overwritten. Here copies are done when issued.
        "async bulk wait_group (read)",
    ],
    # Lanes of a warp; all that have not exited take part.
    "shfl": ["sync idx|bfly|up|down b32"],
    "vote": ["sync any|all pred", "sync ballot b32"],
    "elect": ["sync"],
    "redux": ["sync add|min|max s32", "sync min|max u32", "sync or b32"],
    # Tensor cores
    "mma": [
        f"sync aligned m16n8{k} row col f32 {t} {t} f32"
        for k, t in (
            ("k8", "f16"),
            ("k8", "bf16"),
            ("k16", "f16"),
            ("k16", "bf16"),
            ("k4", "tf32"),
            ("k8", "tf32"),
            ("k32", "e4m3"),
            ("k32", "e5m2"),
        )
    ],  # fmt: skip
    "wgmma": [
        "mma_async sync aligned SHAPE f32 f16 f16",
        "mma_async sync aligned SHAPE f32 bf16 bf16",
        "mma_async sync aligned SHAPE f32 tf32 tf32",
        "mma_async sync aligned SHAPE f32 e4m3|e5m2 e4m3|e5m2",
        "fence|commit_group|wait_group sync aligned",
    ],
    # Control and order
    "bra": ["(uni)"],  # uni: guarantees that lanes do not diverge
    "ret": [""],
    "exit": [""],
    "trap": [""],
    "bar": ["sync", "warp sync"],
    "barrier": ["sync (aligned)"],
    "fence": ["proxy async (shared)"],  # other proxies are not tracked
    "mbarrier": [
        # mbarriers have acquire and release semantics within the CTA here.
        "init|inval shared b64",
        "arrive (release) (cta) shared b64",
        "arrive expect_tx (release) (cta) shared b64",
        "try_wait|test_wait parity (acquire) (cta) shared b64",
    ],
}

WGMMA_SHAPE = re.compile(r"m64n(\d+)k(\d+)")


@functools.cache
def slots(form: str) -> list[tuple[str, list[str]]]:
    """(how, alternatives) per word; how: "" required, "[" optional, "(" optional and dropped."""
    return [
        (how if (how := place[0]) in "[(" else "", place.strip("[]()").split("|"))
        for place in form.split()
    ]


def _fits(word: str, alternatives: list[str]) -> bool:
    return word in alternatives or ("SHAPE" in alternatives and bool(WGMMA_SHAPE.fullmatch(word)))


def _match(form: str, words: Sequence[str]) -> list[str | None] | None:
    """An entry per significant word, None for an absent one; None if the form does not match."""
    found: list[str | None] = []
    rest = list(words)
    for how, alternatives in slots(form):
        fits = bool(rest) and _fits(rest[0], alternatives)
        if not fits and how == "":
            return None
        word = rest.pop(0) if fits else None
        if how != "(":
            found.append(word)
    return None if rest else found


@functools.cache
def modifiers(opcode: str) -> tuple[str, tuple[str | None, ...]]:
    """ "add.rn.f32" → ("add", ("f32",)): the instruction and its significant modifiers."""
    base, *words = opcode.replace("shared::cta", "shared").split(".")  # two names of one memory
    if base not in FORMS:
        raise Unsupported(f"instruction {opcode}")
    for form in FORMS[base]:
        found = _match(form, words)
        if found is not None:
            return base, tuple(found)
    known = [alternatives for form in FORMS[base] for _, alternatives in slots(form)]
    unknown = [word for word in words if not any(_fits(word, k) for k in known)]
    if unknown:
        raise Unsupported(f"modifier .{unknown[0]} of {opcode}")
    raise Unsupported(f"instruction {opcode}, in this combination of modifiers")
