"""Faster versions of parts of Triton's interpreter. Most of an interpreted kernel's time is spent
on the types of blocks, the same few again and again. Types of equal name are equal, so results
are cached by name.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import TensorHandle


def remembered_block_type(init: Callable) -> Callable:
    known: dict[Any, dict[str, Any]] = {}

    def __init__(self: tl.block_type, element_ty: tl.dtype, shape: Iterable[Any]) -> None:
        key = (element_ty.name, *[getattr(size, "value", size) for size in shape])
        if key not in known:
            init(self, element_ty, shape)
            known[key] = dict(vars(self))
        vars(self).update(known[key])

    return __init__


def remembered_tensor(init: Callable) -> Callable:
    known: dict[str, dict[str, Any]] = {}

    def __init__(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        if type.name not in known:
            init(self, None, type)
            known[type.name] = dict(vars(self))
        vars(self).update(known[type.name])
        self.handle = handle

    return __init__


def equal_tuples(self: tl.tuple, other: Any) -> tl.constexpr:
    """The original converts the other shape to a tl.tuple, with type and name, to compare them."""
    return tl.constexpr(list(self) == list(other))


def remembered_numpy_dtype(numpy_dtype: Callable) -> Callable:
    known: dict[str, np.dtype] = {}

    def get_numpy_dtype(dtype: tl.dtype) -> np.dtype:
        if dtype.name not in known:
            known[dtype.name] = numpy_dtype(dtype)
        return known[dtype.name]

    return get_numpy_dtype


def checked_overflow(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor, op: Callable) -> None:
    """Check in two NumPy operations. The original uses the language, ten operations for each one
    checked, even if the result is not used."""
    element = lhs.type.scalar
    if element.int_bitwidth >= 64 or not self.builder.options.debug:
        return
    wide = (operand.handle.data.astype(np.int64) for operand in (lhs, rhs))
    exact = _CHECKED_OPS[op.__name__](*wide)
    inside = (exact >= element.get_int_min_value()) & (exact <= element.get_int_max_value())
    if not inside.all():
        message = f"int{element.int_bitwidth} overflow detected for operation {op.__name__}"
        self.builder.create_assert(TensorHandle(inside, tl.int1), message)


_CHECKED_OPS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def remembered_operands(check: Callable) -> Callable:
    """Cache by the operands' types which types they are cast to and which block a number becomes.
    NumPy broadcasts, whereas the original makes blocks of equal shape."""
    known: dict[Any, list[tuple[tl.dtype, tl.tensor | None]]] = {}

    def kind(operand: Any) -> Any:
        if isinstance(operand, tl.tensor):
            return operand.type.name
        return operand or str(operand), operand.__class__  # 0.0 equals -0.0

    def brought_to(self: TritonSemantic, operand: tl.tensor, type: tl.dtype) -> tl.tensor:
        if operand.type.scalar is not type.scalar:
            operand = self.cast(operand, type.scalar)
        return operand if operand.type is type else tl.tensor(operand.handle, type)

    def binary_op_type_checking_impl(
        self: TritonSemantic, lhs: Any, rhs: Any, *allowed: bool, **options: bool
    ) -> tuple[tl.tensor, tl.tensor]:
        key = kind(lhs), kind(rhs), allowed, *options.items()
        if key not in known:
            found = check(self, lhs, rhs, *allowed, **options)
            known[key] = [
                (out.type, None if isinstance(x, tl.tensor) else out)
                for x, out in zip((lhs, rhs), found, strict=True)
            ]
        (left, left_number), (right, right_number) = known[key]
        return (
            brought_to(self, lhs, left) if left_number is None else left_number,
            brought_to(self, rhs, right) if right_number is None else right_number,
        )

    return binary_op_type_checking_impl


def direct_builtin(interpreted: Callable) -> Callable:
    """A function of the language without its three wrappers."""
    member = (getattr(interpreted, "__kwdefaults__", None) or {}).get("member")
    if member is None:
        return interpreted
    found = inspect.getclosurevars(interpreted)
    # A global since Triton 3.9.
    semantic = found.nonlocals.get("semantic") or found.globals["interpreter_semantic"]
    function = inspect.unwrap(member)

    def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        return function(*args, _semantic=semantic, **kwargs)

    return call


def unwrapped(unwrap: Callable) -> Callable:
    """Shortcut for tensors, the usual case."""
    return lambda x: x if x.__class__ is tl.tensor else unwrap(x)


_PHILOX = np.array([[0xD2511F53, 0x9E3779B9], [0xCD9E8D57, 0xBB67AE85]], dtype=np.uint64)


def faster_philox(original: Callable) -> Callable:
    """32-bit Philox in NumPy: the ten rounds are 80 operations of the language and take a third of
    the time of an attention kernel with dropout."""
    (round_a, raise_0), (round_b, raise_1) = _PHILOX
    low = np.uint64(0xFFFFFFFF)

    def philox_impl(
        c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, k0: tl.tensor, k1: tl.tensor,
        n_rounds: Any,
    ) -> tuple[tl.tensor, ...]:  # fmt: skip
        if c0.dtype != tl.uint32:
            return original(c0, c1, c2, c3, k0, k1, n_rounds)
        a, b, c, d, key_0, key_1 = (
            x.handle.data.astype(np.uint64) for x in (c0, c1, c2, c3, k0, k1)
        )
        for _ in range(tl.core._unwrap_if_constexpr(n_rounds)):
            product_a, product_b = round_a * a, round_b * c
            a, c = (product_b >> 32) ^ b ^ key_0, (product_a >> 32) ^ d ^ key_1
            b, d = product_b & low, product_a & low
            key_0, key_1 = (key_0 + raise_0) & low, (key_1 + raise_1) & low
        words = (TensorHandle(x.astype(np.uint32), tl.uint32) for x in (a, b, c, d))
        return tuple(tl.tensor(word, c0.type) for word in words)

    return philox_impl
