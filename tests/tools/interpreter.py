"""Runs plain ``@triton.jit`` kernels on CPU tensors in a repaired version of Triton's interpreter.

After ``install()`` launches are interpreted if all their tensors are on the CPU. Launches on CUDA
tensors and ahead-of-time compilation in the same process are not affected, and no environment
variable is needed. For Triton 3.6 to 3.9, whose interpreter

- computes on the raw bits of bfloat16 and truncates where it should round;
- fails with NumPy >= 2.4 on a loop bound that is a tensor;
- rounds to fp8 without a carry;
- passes a float argument as a Python number, whereas a compiled kernel gets a float32.

The compiler's rules on launch options, grid limits and the smallest ``tl.dot`` are enforced, and
each launch is first lowered to Triton's IR (``lowering``), which rejects code that the interpreter
would accept. Not covered: tf32, shared memory, registers.
"""

from __future__ import annotations

import functools
import itertools
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter
from torch import Tensor
from triton.backends.nvidia.compiler import CUDAOptions
from triton.language.semantic import TritonSemantic
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.tools import interpreter_speed as speed
from tests.tools import lowering

Program = tuple[int, int, int]

_MAX_GRID = (2**31 - 1, 65535, 65535)
_LAUNCH_OPTIONS = frozenset(CUDAOptions.__dataclass_fields__)


# ------------------------------------------------------------------------------------ bfloat16
# The interpreter stores bfloat16 as uint16. float32 is wide enough for every operation on it.


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 held in uint16 → float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Any float → bfloat16 held in uint16, to nearest even; a NaN stays a quiet NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrowed(handle: TensorHandle) -> TensorHandle:
    """Convert back to bfloat16; results of comparisons stay bool."""
    if handle.data.dtype == np.bool_:
        return TensorHandle(handle.data, tl.int1)
    return TensorHandle(narrow(handle.data), tl.bfloat16)


_FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def _in_float64(handle: TensorHandle) -> np.ndarray:
    if handle.dtype.scalar in _FP8:
        return torch.from_numpy(handle.data).view(_FP8[handle.dtype.scalar]).double().numpy()
    return _widened(handle).data.astype(np.float64)


def _to_fp8(src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
    """Round to nearest even and saturate, like the instruction; the original does not carry when it
    rounds up."""
    largest = torch.finfo(_FP8[dst_type]).max
    values = torch.from_numpy(np.ascontiguousarray(src.data)).float().clamp(-largest, largest)
    return TensorHandle(values.to(_FP8[dst_type]).view(torch.uint8).numpy(), dst_type)


_PRODUCT = "exact product"  # an attribute of a handle: float64, unrounded


class Builder(InterpreterBuilder):
    """Computes block operations, with one method for each instruction of Triton's IR."""

    gpu_arithmetic = False

    def create_inline_asm(
        self, asm: str, constraints: str, values: list[TensorHandle], *_: Any
    ) -> Any:
        """Empty assembly only keeps the compiler from moving a value."""
        if asm:
            raise NotImplementedError(f"inline assembly is not interpreted: {asm!r}")
        return types.SimpleNamespace(get_result=values.__getitem__)

    def get_bf16(self, value: float) -> TensorHandle:
        return TensorHandle(narrow(np.array([value])), tl.bfloat16)

    def cast_impl(self, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        to_bf16 = dst_type.scalar == tl.bfloat16
        if _is_bf16(src) == to_bf16:
            return super().cast_impl(src, dst_type)
        if to_bf16:
            return _narrowed(src if src.data.dtype != np.bool_ else super().cast_impl(src, tl.int8))
        return super().cast_impl(_widened(src), dst_type)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: tl.dtype, *rounding: Any):
        if _is_bf16(src) or dst_type.scalar == tl.bfloat16:
            return self.cast_impl(src, dst_type)
        if dst_type.scalar in _FP8:
            return _to_fp8(src, dst_type.scalar)
        return super().create_fp_to_fp(src, dst_type, *rounding)

    def unary_op(self, arg: TensorHandle, op: Callable) -> TensorHandle:
        if not _is_bf16(arg):
            return super().unary_op(arg, op)
        return _narrowed(super().unary_op(_widened(arg), op))

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Callable) -> TensorHandle:
        if self.gpu_arithmetic and lhs.dtype.scalar == tl.float32:
            return self._contracted(lhs, rhs, op)
        if not _is_bf16(lhs):
            return super().binary_op(lhs, rhs, op)
        return _narrowed(super().binary_op(_widened(lhs), _widened(rhs), op))

    def ternary_op(self, lhs: TensorHandle, rhs: TensorHandle, other: TensorHandle, op: Callable):
        if not _is_bf16(other) or op is np.where:  # a selection only moves bits
            return super().ternary_op(lhs, rhs, other, op)
        return _narrowed(super().ternary_op(_widened(lhs), _widened(rhs), _widened(other), op))

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if z.data.dtype == np.float32:  # rounded once, in the original twice
            exact = x.data.astype(np.float64) * y.data + z.data
            return TensorHandle(exact.astype(np.float32), z.dtype.scalar)
        if not _is_bf16(z):
            return super().create_fma(x, y, z)
        return _narrowed(super().create_fma(_widened(x), _widened(y), _widened(z)))

    # On a GPU min and max return the other operand if one is NaN.
    def create_minnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_erf(self, arg: TensorHandle) -> TensorHandle:
        # In float64, then rounded once; the original calls math.erf element by element.
        exact = torch.erf(torch.from_numpy(arg.data.astype(np.float64))).numpy()
        return TensorHandle(exact.astype(arg.data.dtype), arg.dtype.scalar)

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any):
        # Rounded once: BLAS sums float32 in an order that depends on the CPU and on the shapes, so
        # Q Kᵀ and K Qᵀ would differ.
        total = np.matmul(_in_float64(a), _in_float64(b)) + d.data
        return TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)

    # A float32 product carries its exact value, also through reshapes, to a sum that uses it
    # unrounded.
    def _contracted(self, lhs: TensorHandle, rhs: TensorHandle, op: Callable) -> TensorHandle:
        if op is np.multiply:
            out = super().binary_op(lhs, rhs, op)
            out.attr[_PRODUCT] = lhs.data.astype(np.float64) * rhs.data
            return out
        if op is np.add or op is np.subtract:
            # Of two products only the left one stays exact.
            exact = [handle.attr.get(_PRODUCT) for handle in (lhs, rhs)]
            if exact[0] is not None:
                return TensorHandle(op(exact[0], rhs.data).astype(np.float32), tl.float32)
            if exact[1] is not None:
                return TensorHandle(op(lhs.data, exact[1]).astype(np.float32), tl.float32)
        return super().binary_op(lhs, rhs, op)

    def create_fdiv(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        if not self.gpu_arithmetic or lhs.dtype.scalar != tl.float32:
            return super().create_fdiv(lhs, rhs)
        return TensorHandle(lhs.data * (np.float32(1.0) / rhs.data), tl.float32)

    def _reshaped(self, arg: TensorHandle, change: Callable) -> TensorHandle:
        out = change(arg)
        if _PRODUCT in arg.attr:
            out.attr[_PRODUCT] = change(TensorHandle(arg.attr[_PRODUCT], tl.float64)).data
        return out

    def create_expand_dims(self, arg: TensorHandle, axis: int) -> TensorHandle:
        return self._reshaped(arg, lambda x: super(Builder, self).create_expand_dims(x, axis))

    def create_broadcast(self, arg: TensorHandle, shape: Iterable[int]) -> TensorHandle:
        return self._reshaped(arg, lambda x: super(Builder, self).create_broadcast(x, shape))


class _Bf16Reduction:
    """Reduces and scans bfloat16 blocks in float32."""

    def apply_impl(self, operands: tuple[tl.tensor, ...]) -> Any:
        wide = tuple(_retyped(t, _widened(t.handle)) for t in operands)
        result = super().apply_impl(wide)  # type: ignore[misc]
        if not isinstance(result, (list, tuple)):
            return self._like(operands[0], result)
        return tuple(self._like(t, r) for t, r in zip(operands, result, strict=True))

    @staticmethod
    def _like(operand: tl.tensor, result: tl.tensor) -> tl.tensor:
        if _is_bf16(operand.handle) and result.dtype == tl.float32:
            return _retyped(result, _narrowed(result.handle))
        return result


class _ReduceOps(_Bf16Reduction, triton_interpreter.ReduceOps):
    pass


class _ScanOps(_Bf16Reduction, triton_interpreter.ScanOps):
    pass


def _retyped(tensor: tl.tensor, handle: TensorHandle) -> tl.tensor:
    if handle is tensor.handle:
        return tensor
    shape = list(handle.data.shape)
    is_block = tensor.type.is_block()
    return tl.tensor(handle, tl.block_type(handle.dtype, shape) if is_block else handle.dtype)


# -------------------------------------------------------------------- exchange of the language


def _to_index(tensor: tl.tensor) -> int:
    return int(tensor.handle.data.item())


@functools.cache
def _rewritten(fn: Callable) -> Callable:
    """The kernel's Python function with the interpreter's handling of assignments."""
    rewritten = triton_interpreter.FunctionRewriter(fn).rewrite_ast()
    return speed.faster_philox(rewritten) if fn is tl.random.philox_impl.fn else rewritten


def _call_helper(helper: JITFunction, *args: Any, **kwargs: Any) -> Any:
    return _rewritten(helper.fn)(*args, **kwargs)


@functools.cache
def _exchanges() -> list[tuple[Any, str, Any, Any]]:
    """(owner, attribute, interpreted, original) of every attribute patched during a launch.

    Triton rebuilds this for each launch and each call of a helper, although it never changes.
    """
    visible = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    scope = triton_interpreter._patch_lang(visible)
    scope.set_attr(tl.tensor, "__index__", _to_index)
    scope.set_attr(JITFunction, "__call__", _call_helper)
    scope.set_attr(tl.tensor, "__init__", speed.remembered_tensor(tl.tensor.__init__))
    scope.set_attr(tl.tuple, "__eq__", speed.equal_tuples)
    scope.set_attr(tl.block_type, "__init__", speed.remembered_block_type(tl.block_type.__init__))
    scope.set_attr(TritonSemantic, "binary_op_sanitize_overflow_impl", speed.checked_overflow)
    operands = TritonSemantic.binary_op_type_checking_impl
    scope.set_attr(
        TritonSemantic, "binary_op_type_checking_impl", speed.remembered_operands(operands)
    )
    scope.set_attr(tl.core, "_unwrap_if_constexpr", speed.unwrapped(tl.core._unwrap_if_constexpr))
    # Some attributes are patched twice: the first entry has the true original.
    originals = {(owner, name): old for owner, name, old in reversed(scope._changes)}
    exchanges = [
        (owner, name, speed.direct_builtin(getattr(owner, name)), old)
        for (owner, name), old in originals.items()
    ]
    scope.restore()
    return exchanges


@contextmanager
def _interpreted_language() -> Iterator[None]:
    # A GPU gives no warnings for exp(-inf) or inf - inf.
    with np.errstate(all="ignore"):
        exchanges = _exchanges()
        try:
            for owner, name, interpreted, _ in exchanges:
                setattr(owner, name, interpreted)
            yield
        finally:
            for owner, name, _, original in exchanges:
                if original is triton_interpreter._MISSING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, original)


# ------------------------------------------------------------------------------------- launches


class Observer:
    """Observes every interpreted launch; base class of ``sanitizer``'s."""

    def programs(self, tensors: list[Tensor], programs: list[Program]) -> list[Program]:
        """Called before a launch with its tensors and its programs in grid order. Returns the
        programs in the order in which to run them."""
        return programs


observer = Observer()


@contextmanager
def gpu_arithmetic() -> Iterator[None]:
    """Compute float32 as on a GPU. A product that is directly an operand of a sum or difference is
    not rounded: the two are one instruction (fma). A quotient is a product with a reciprocal,
    within 2 ulp; ``tl.div_rn`` stays exact."""
    install()
    with mock.patch.object(triton_interpreter.interpreter_builder, "gpu_arithmetic", True):
        yield


def _scalar(value: Any, dtype: tl.dtype, numpy_dtype: type) -> tl.tensor:
    return tl.tensor(TensorHandle(np.array([value], dtype=numpy_dtype), dtype), dtype)


def _runtime_argument(value: Any) -> Any:
    """The argument as a compiled kernel gets it: a float as float32, a bool as int1."""
    if isinstance(value, bool):
        return _scalar(value, tl.int1, np.bool_)
    if isinstance(value, float):
        return _scalar(value, tl.float32, np.float32)
    return triton_interpreter._implicit_cvt(value)


def _bind(kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name → argument with defaults; raises where a compiled launch would."""
    named = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    for name in kwargs.keys() - named.keys():
        if name not in _LAUNCH_OPTIONS:
            raise KeyError(f"Keyword argument {name} was specified but unrecognised")
    bound = kernel.signature.bind(*args, **named)
    bound.apply_defaults()
    return bound.arguments


def _programs(grid: tuple[int, ...]) -> list[Program]:
    sizes = (*grid, 1, 1)[:3]
    if len(grid) > 3 or any(size > most for size, most in zip(sizes, _MAX_GRID, strict=True)):
        raise ValueError(f"grid must have at most 3 dimensions of at most {_MAX_GRID}, got {grid}")
    n_x, n_y, n_z = map(range, sizes)
    return list(itertools.product(n_x, n_y, n_z))


def _interpret(kernel: JITFunction, grid: Any, arguments: dict[str, Any]) -> None:
    if callable(grid):
        grid = grid(arguments)
    builder = triton_interpreter.interpreter_builder
    programs = observer.programs(_tensors(arguments.values()), _programs(tuple(grid)))
    builder.set_grid_dim(*(*grid, 1, 1)[:3])
    constexprs = {param.name for param in kernel.params if param.is_constexpr}
    with _interpreted_language():
        run = _rewritten(kernel.fn)
        call = {
            name: value if name in constexprs else _runtime_argument(value)
            for name, value in arguments.items()
        }
        for program in programs:
            builder.set_grid_idx(*program)
            run(**call)


def _tensors(arguments: Iterable[Any]) -> list[Tensor]:
    bases = (value.base if isinstance(value, TensorDescriptor) else value for value in arguments)
    return [base for base in bases if isinstance(base, Tensor)]


def _all_on_cpu(arguments: Iterable[Any]) -> bool:
    return {tensor.device.type for tensor in _tensors(arguments)} == {"cpu"}


@functools.cache
def install() -> None:
    """Install for the rest of the process; idempotent."""
    triton_interpreter._get_np_dtype = speed.remembered_numpy_dtype(
        triton_interpreter._get_np_dtype
    )
    triton_interpreter.ReduceOps = _ReduceOps
    triton_interpreter.ScanOps = _ScanOps
    builder = triton_interpreter.interpreter_builder
    builder.__class__ = Builder
    # Triton 3.6 compiles no tl.dot with a smaller K; later versions do, for float32 and float64.
    builder.codegen_fns["min_dot_size"] = lambda lhs_type, rhs_type: (1, 1, 16)

    compiled_run = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if warmup or self.is_gluon() or not _all_on_cpu((*args, *kwargs.values())):
            return compiled_run(self, *args, grid=grid, warmup=warmup, **kwargs)
        arguments = _bind(self, args, kwargs)
        with lowering.LANGUAGE:  # grid, program, observer and language are global
            lowering.lower_once(self, args, kwargs)
            return _interpret(self, grid, arguments)

    JITFunction.run = run
