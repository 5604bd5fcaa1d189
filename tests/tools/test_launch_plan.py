"""Every launch that a user's GPU may get (``launch_plan``) compiles for it.

The default run lowers programs to Triton's IR, which finds errors of the language: a method called
on an argument that is 1, incompatible types, a block size that is not a power of two. Every pair of
kinds of two arguments of a kernel occurs in one of them. The slow run compiles every program of
the plan to PTX (about a quarter of an hour on one core); it finds errors of layouts and pipelining
and checks that all programs fit into an architecture's shared memory. ``test_ptx_kernels`` compiles
some programs of each kernel and dtype. Neither sees registers and spills, which only ptxas knows:
see ``setup.py build_kernels``, which runs it for all architectures.
"""

import functools
import itertools

import pytest

from bench._compile.static import max_shared_memory
from tests.tools import launch_plan
from tests.tools.lowering import LANGUAGE, Specialisation, specialise

# sm_86 has the launch tables and instructions of sm_80, and the check for sm_80 takes its smaller
# shared memory into account; sm_89 adds fp8.
COMPILED = (80, 89, 90, 100, 120)

# Arguments that host code guarantees to be multiples of 16, or of 16 bytes.
_ATTENTION_STRIDES = {f"{x}_stride_{y}" for x in "qkv" for y in "bht"}
NEVER_1 = {
    "_attention_fwd_kernel": _ATTENTION_STRIDES,
    "_attention_bwd_dq_kernel": {*_ATTENTION_STRIDES, "dq_stride_t"},
    "_attention_bwd_dkdv_kernel": {*_ATTENTION_STRIDES, "dkdv_stride_t"},
    "_attention_decode_kernel": {"qkv_stride_b"},  # at least 3
    "_layer_norm_bwd_means_kernel": {"x_stride_row", "n_cols"},  # only for wide rows
    "_linear_gelu_kernel": {"a_stride", "w_stride", "n_cols", "n_inner"},
    "_weight_grad_kernel": {"dy_stride", "x_stride", "n_rows", "n_cols", "tokens_per_split"},
    "_cross_entropy_rows_kernel": {"padded_cols"},
    "_amax_kernel": {"n"},
    "_quantise_kernel": {"n_cols"},
    "_transpose_kernel": {"n_cols", "padded_rows"},
}


@functools.cache
def programs(capability: int) -> list[Specialisation]:
    """The plan's programs, each once, with the most arguments divisible by 16, for which the
    compiler pipelines more and uses more shared memory."""
    found: dict[str, Specialisation] = {}
    for launch in launch_plan.launches(capability):
        one = specialise(launch.kernel, launch.args, dict(launch.options), capability)
        best = found.setdefault(one.program, one)
        if len(one.source.attrs) > len(best.source.attrs):
            found[one.program] = one
    return list(found.values())


def assert_compiles(program: Specialisation, capability: int) -> None:
    with LANGUAGE:
        shared = program.compile()["shared"]
    limit = max_shared_memory(capability)
    assert shared <= limit, f"{program} needs {shared} bytes of shared memory, of {limit}"


def test_every_pair_of_options_occurs() -> None:
    chosen = launch_plan.pairs(dict(a=(1, 2, 3), b=("x", "y"), c=(False, True)))
    for a, b in (("a", "b"), ("a", "c"), ("b", "c")):
        pairs = {(one[a], one[b]) for one in chosen}
        assert len(pairs) == len({x for x, _ in pairs}) * len({y for _, y in pairs})
    assert {one["a"] for one in chosen} == {1, 2, 3} and len(chosen) < 12


def test_every_argument_that_is_specialised_is_1_somewhere() -> None:
    ones: dict[str, set[str]] = {}
    runtime: dict[str, set[str]] = {}
    for program in programs(90):
        for name, kind in program.source.signature.items():
            path = (program.source.fn.arg_names.index(name),)
            param = program.source.fn.params[path[0]]
            if param.is_constexpr or param.do_not_specialize:
                continue
            if kind in ("i32", "i64"):
                runtime.setdefault(program.source.name, set()).add(name)
            elif program.source.constants.get(path) == 1:
                ones.setdefault(program.source.name, set()).add(name)
    for kernel, names in runtime.items():
        assert names - ones.get(kernel, set()) == NEVER_1.get(kernel, set()), kernel
    assert all(names <= runtime[kernel] for kernel, names in NEVER_1.items())


@pytest.mark.slow
def test_sm_86_is_asked_what_sm_89_is() -> None:
    """sm_89 only adds fp8."""
    assert {one.program for one in programs(86)} <= {one.program for one in programs(89)}


def test_every_pair_of_kinds_of_arguments_lowers() -> None:
    # sm_80 and sm_120 launch what sm_89 does, by their classes in the launch tables.
    kinds = {one.kind: one for capability in (89, 90, 100) for one in programs(capability)}
    left = {
        kind: {(one.source.name, *pair) for pair in itertools.combinations(one.kinds, 2)}
        for kind, one in kinds.items()
    }
    while left:  # next the program with the most uncovered pairs
        kind = max(left, key=lambda kind: len(left[kind]))
        if pairs := left.pop(kind):
            for others in left.values():
                others -= pairs
            with LANGUAGE:
                kinds[kind].lower()


@pytest.mark.slow
@pytest.mark.parametrize("capability", COMPILED)
def test_every_program_compiles(capability: int) -> None:
    known = {one.program for one in programs(80)} if capability == 89 else set()
    for program in programs(capability):
        if program.program not in known:
            assert_compiles(program, capability)
