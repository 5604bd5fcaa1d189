"""Findings and errors of the pretended device, each with a correct version of the same program that
passes. Started by ``test_pretend_cuda.py``.
"""

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.tools.pretend_cuda import device
from tests.tools.toy_kernels import cast_kernel

N = 8


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    device.end()
    yield
    assert device.end() == []


def found(pattern: str | None) -> None:
    """Assert that there is one finding and it matches; None: that there is none."""
    findings = device.end()
    if pattern is None:
        assert findings == []
    else:
        assert len(findings) == 1 and re.search(pattern, findings[0]), findings
        assert "on_itself.py" in findings[0]


def ones() -> Tensor:
    return torch.ones(N, device="cuda")


def captured(work: Callable[[], object], stream: torch.cuda.Stream | None = None):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph


# ------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("waits", [False, True])
def test_a_read_of_what_another_stream_writes(waits: bool) -> None:
    x, side = ones(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.add_(1)
    if waits:
        torch.cuda.current_stream().wait_stream(side)
    y = x * 2
    side.synchronize()
    found(None if waits else r"race: aten::mul.* reads what aten::add.* on stream \d+ uses")
    assert y.tolist() == [4.0] * N


@pytest.mark.parametrize("waits", [False, True])
def test_a_write_of_what_another_stream_reads(waits: bool) -> None:
    x, side = ones(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x * 2
        read = side.record_event()
    if waits:
        read.wait()
    x.zero_()
    found(None if waits else "race: aten::zero_ .* writes what aten::mul")
    torch.cuda.synchronize()
    assert y.sum().item() == 2 * N


@pytest.mark.parametrize("waits", ["event", "stream", "device", "item", "too early", "other"])
def test_the_host_may_wait_in_their_place(waits: str) -> None:
    x, side = ones(), torch.cuda.Stream()
    torch.cuda.synchronize()
    early = side.record_event()
    with torch.cuda.stream(side):
        x.add_(1)
        if waits == "event":
            side.record_event().synchronize()
        elif waits == "item":
            x[0].item()
    if waits == "stream":
        side.synchronize()
    elif waits == "device":
        torch.cuda.synchronize()
    elif waits == "too early":
        early.synchronize()
    elif waits == "other":
        torch.cuda.current_stream().synchronize()
    x.mul(2)
    torch.cuda.synchronize()
    found("race" if waits in ("too early", "other") else None)


@pytest.mark.parametrize("waits", [False, True])
def test_a_kernel_takes_part(waits: bool) -> None:
    x, y, side = ones(), torch.empty(N, device="cuda"), torch.cuda.Stream()
    if waits:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        cast_kernel[(1,)](x, y, N, BLOCK=N)
    torch.cuda.synchronize()
    found(None if waits else "race: cast_kernel on stream")


@pytest.mark.parametrize("waits", [False, True])
def test_a_graph_takes_part(waits: bool) -> None:
    x = ones()
    graph = captured(lambda: x.add_(1))
    x.zero_()
    side = torch.cuda.Stream()
    if waits:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.replay()
    torch.cuda.synchronize()
    found(None if waits else "race: the graph on stream")


@pytest.mark.parametrize("done", [None, "recorded", "waited"])
def test_memory_is_freed_while_another_stream_uses_it(done: str | None) -> None:
    x, side = ones(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.mul(2)
    if done == "recorded":
        x.record_stream(side)
    del x
    if done == "waited":
        torch.cuda.current_stream().wait_stream(side)
    ones()
    found(None if done else "may get memory that was freed while aten::mul.* no record_stream")


def test_streams_of_the_backward_pass() -> None:
    """PyTorch's engine synchronises the streams itself."""
    w, side = ones().requires_grad_(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss = (w * w).sum()
    torch.cuda.current_stream().wait_stream(side)
    loss.backward()
    assert w.grad is not None and w.grad.tolist() == [2.0] * N


# -------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("waits", [False, True])
def test_a_copy_to_the_host(waits: bool) -> None:
    """Until the host has waited, the values are NaN."""
    y = ones().to("cpu", non_blocking=True)
    assert y.isnan().all()
    if waits:
        torch.cuda.synchronize()
        assert y.tolist() == [1.0] * N
    found(None if waits else "never waits for a non_blocking copy")


@pytest.mark.parametrize("waits", [False, True])
def test_pinned_memory_is_changed(waits: bool) -> None:
    x = torch.ones(N).pin_memory()
    y = x.to("cuda", non_blocking=True)
    if waits:
        torch.cuda.synchronize()
    x.zero_()
    found(None if waits else "pinned memory .* was changed before its copy was done")
    assert y.tolist() == [1.0] * N


def test_copies_that_the_host_waits_for() -> None:
    x = torch.ones(N)
    y = x.to("cuda", non_blocking=True)  # pageable memory
    x.zero_()
    assert y.cpu().tolist() == [1.0] * N


def test_tensors_of_two_devices() -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        ones() + torch.ones(N)
    assert (ones() + torch.tensor(1.0)).tolist() == [2.0] * N
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        cast_kernel[(1,)](ones(), torch.empty(N), N, BLOCK=N)


# ------------------------------------------------------------------------------------ captures


def test_replays_draw_and_add_anew() -> None:
    x, total = ones(), torch.zeros(N, device="cuda")
    drawn = torch.empty(N, device="cuda")

    def work() -> None:
        total.add_(x)
        drawn.uniform_()

    torch.manual_seed(1)
    graph = captured(work)
    assert total.tolist() == [0.0] * N and drawn.isnan().all()  # the capture executes nothing
    x.fill_(2.0)
    draws = []
    for _ in range(2):
        graph.replay()
        draws.append(drawn.tolist())
    assert total.tolist() == [4.0] * N
    torch.manual_seed(1)
    assert draws == [torch.rand(N, device="cuda").tolist() for _ in range(2)]


def test_results_of_a_capture_hold_nothing_before_a_replay() -> None:
    out = []
    graph = captured(lambda: out.append(ones() * 3))
    assert out[0].isnan().all()
    graph.replay()
    assert out[0].tolist() == [3.0] * N


REFUSED: dict[str, Callable[[Tensor], object]] = {
    "_local_scalar_dense": lambda x: x[0].item(),
    "nonzero": lambda x: x.nonzero(),
    "nonzero.*": lambda x: x[x > 0],
    "pageable memory": lambda x: x.cpu(),
    "pageable": lambda x: torch.ones(N).to("cuda", non_blocking=True),
    "a copy that the host waits for": lambda x: x.copy_(torch.ones(N).pin_memory()),
    "cudaDeviceSynchronize": lambda x: torch.cuda.synchronize(),
    "cudaStreamSynchronize": lambda x: torch.cuda.current_stream().synchronize(),
    "cudaStreamQuery": lambda x: torch.cuda.current_stream().query(),
    "cudaEventSynchronize": lambda x: torch.cuda.current_stream().record_event().synchronize(),
    "cudaEventQuery": lambda x: torch.cuda.current_stream().record_event().query(),
    "cudaFree": lambda x: torch.cuda.empty_cache(),
    r"pageable memory \(3,\)": lambda x: x[torch.arange(3)],
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_capture_refuses(what: str) -> None:
    x = ones()
    REFUSED[what](x)
    torch.cuda.synchronize()

    def work() -> None:
        x.add_(1)
        REFUSED[what](x)

    with pytest.raises(RuntimeError, match=f"stream is capturing: .*{what}"):
        captured(work)
    assert not torch.cuda.is_current_stream_capturing()
    assert x.add(1)[0].isfinite()


def test_a_copy_from_pinned_memory_in_a_capture() -> None:
    x, pinned = ones(), torch.ones(N).pin_memory()
    graph = captured(lambda: x.copy_(pinned, non_blocking=True))
    pinned.fill_(5.0)
    graph.replay()
    assert x.tolist() == [5.0] * N


def test_memory_of_a_graph_is_freed() -> None:
    used = [ones()]
    graph = captured(lambda: used[0].add_(1))
    graph.replay()
    used.clear()
    with pytest.raises(RuntimeError, match="uses memory that was freed after its capture"):
        graph.replay()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_kernel_is_compiled_in_a_capture(compiled: bool) -> None:
    x, y = ones(), ones()
    n = 3 + compiled  # a size that no other test uses
    if compiled:
        cast_kernel[(1,)](x, y, n, BLOCK=16)
    graph = captured(lambda: cast_kernel[(1,)](x, y, n, BLOCK=16 if compiled else 32))
    found(None if compiled else "cast_kernel is compiled in a capture")
    graph.replay()


def test_an_empty_capture() -> None:
    captured(lambda: None)
    found("the captured CUDA graph is empty")


@pytest.mark.parametrize("inside", [False, True])
def test_a_capture_waits_for_other_work(inside: bool) -> None:
    x, side, other = ones(), torch.cuda.Stream(), torch.cuda.Stream()
    event = other.record_event()

    def work() -> None:
        x.add_(1)
        if inside:
            event.record()  # makes it part of the capture
        event.wait()

    captured(work, side)
    found(None if inside else "a capture waits for work outside of it")


def test_work_beside_a_capture() -> None:
    x, other = ones(), torch.cuda.Stream()

    def work() -> None:
        x.add_(1)
        with torch.cuda.stream(other):
            x.mul(2)

    captured(work)
    found(r"aten::mul.* on stream \d+ while stream \d+ is capturing")


def test_a_second_stream_joins_a_capture() -> None:
    x, other = ones(), torch.cuda.Stream()

    def work() -> None:
        x.add_(1)
        other.wait_stream(torch.cuda.current_stream())

    captured(work)
    found("only one stream can be followed")


def test_captures_on_the_default_stream() -> None:
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="must be captured on a non-default stream"):
        graph.capture_begin()
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        graph.replay()


# ------------------------------------------------------------------------------------- kernels


def test_a_filled_kernel_depends_on_all_that_it_reads() -> None:
    def result(change: int | None, n: int = N) -> Tensor:
        x, y = ones(), torch.empty(N, device="cuda")
        if change is not None:
            x[change] += 1e-6
        cast_kernel[(1,)](x, y, n, BLOCK=N)
        assert y.isfinite().all()
        return y.cpu()

    assert torch.equal(result(None), result(None))
    results = [result(change) for change in (None, 0, N - 1)] + [result(None, N - 1)]
    for i, one in enumerate(results):
        assert all(not torch.equal(one, other) for other in results[:i])


def test_a_kernel_in_place_is_interpreted() -> None:
    x, y = ones(), ones() * 4
    cast_kernel[(1,)](y, x, N, BLOCK=N)
    assert x.tolist() == [4.0] * N


def test_memory_is_counted() -> None:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = torch.empty(1000, device="cuda")
    assert torch.cuda.memory_allocated() - before == 4000
    del x
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before == 4000


def test_sync_debug_mode() -> None:
    x = ones()
    torch.cuda.set_sync_debug_mode("error")
    try:
        x.add_(1)
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            x[0].item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
