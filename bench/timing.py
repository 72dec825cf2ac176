"""Times and memory on a GPU: the same rules for every implementation."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_FLUSHED = 4 * 2**30  # bytes, about a millisecond of writing on an H200
LONG = 100.0  # milliseconds: what takes longer is repeated three times only

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Times:
    """Milliseconds of a forward pass without gradients and of the backward pass alone, peak memory
    of both together in GiB above the inputs, and the host's time for a forward pass in us."""

    forward: float
    backward: float
    peak: float
    host: float


def inputs(length: int, heads: int, head_size: int, tokens: int, device) -> list[Tensor]:
    """``q, k, v, dout``: ``(B, H, L, D)`` bfloat16 in ``(B, L, H, D)`` memory, always the same."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (max(1, tokens // length), length, heads, head_size)
    numbers = [
        torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        for _ in range(4)
    ]
    return [x.transpose(1, 2) for x in numbers]


def measure(attention: Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Times:
    """Time an implementation, compiled and warm."""
    results(attention, q, k, v, dout)  # compiles both directions
    with torch.no_grad():
        forward = milliseconds(lambda: attention(q, k, v))
        host = host_microseconds(lambda: attention(q, k, v))
    backward = _backward(attention, q, k, v, dout)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results(attention, q, k, v, dout)
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    return Times(forward, backward, peak, host)


def _backward(attention: Attention, q, k, v, dout) -> float:
    """Time of the backward pass on one graph, which is gone when this returns."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return milliseconds(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))


def results(attention: Attention, q, k, v, dout) -> list[Tensor]:
    """``out, dq, dk, dv``."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of a call on the GPU, with a cold L2 cache.

    Before each call a large buffer is written: that empties the cache, and keeps the GPU busy while
    the host prepares what is timed. In training the host runs ahead in the same way;
    `host_microseconds` says what it needs.
    """
    run()
    buffer = torch.empty(_FLUSHED, dtype=torch.int8, device="cuda")
    once = statistics.median(_once(run, buffer) for _ in range(3))
    if once > LONG:
        return once
    return statistics.median(_once(run, buffer) for _ in range(max(10, min(60, int(80 / once)))))


def _once(run: Callable[[], object], buffer: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    buffer.zero_()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def host_microseconds(run: Callable[[], object]) -> float:
    """Time in which the host has started a call, whatever the GPU does then."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        run()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / 20 * 1e6


def wall_milliseconds(run: Callable[[], object]) -> float:
    """One call, by the clock of the host, with the work on the GPU that it starts."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def matmul_ceiling(device) -> float:
    """TF/s of a bfloat16 product of 8192-square matrices: what the card sustains."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9
