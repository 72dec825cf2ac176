"""One configuration on the card at hand: are its numbers right, and how long does it take?"""

import torch
import triton
from triton.runtime.errors import OutOfResources

from kernels.attend import attend
from kernels.patterns import causal, global_tokens, window

# Full tiles, cut tiles, a ragged end, and rows long enough to be split.
PATTERN = causal() & (window(150) | global_tokens(3))
LENGTH = 1100
TOKENS = {"short": 65_536, "long": 16_384}  # timed, of 16 heads of up to 64, by kind of rows


def is_right(head_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether output and gradients are as exact as the reference computes them in this dtype.

    The allowance is twice the error of the reference, which rounds its results alone, and four
    roundings for the weights and scores that the kernels round between their products. A
    configuration that the card has no room for is not right.
    """
    errors = compare(head_size, dtype, device)
    return errors is not None and all(error <= allowed for error, allowed in errors.values())


def compare(
    head_size: int, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[float, float]] | None:
    """Largest error and allowance of out, lse, dq, dk and dv; None if the card has no room."""
    inputs = _inputs(2, 300 if dtype == torch.float32 else LENGTH, head_size, dtype, device)
    try:
        actual = _run(inputs, "fused")
    except OutOfResources:
        return None
    truth = _run([x.double() for x in inputs], "reference")
    plain = _run(inputs, "reference")
    largest = max(float(t.abs().max()) for t in truth.values())
    sums = 8 * torch.finfo(torch.float32).eps * largest
    errors = {}
    for name, t in truth.items():
        rounding = 4 * torch.finfo(dtype).eps * float(t.abs().max())
        allowed = 2 * _distance(plain[name], t) + rounding + sums
        errors[name] = (_distance(actual[name], t), allowed)
    return errors


def milliseconds(
    direction: str, rows: str, head_size: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Time of the forward pass, or of the whole backward pass.

    The patterns have the structure of the one that is checked, so that nothing more is compiled,
    and the shapes keep the card busy for longer than the host needs to start a kernel.
    """
    length = TOKENS[rows] * 64 // max(head_size, 64)
    q, k, v, dout = _inputs(16, length, head_size, dtype, device)
    pattern = causal() & (window(512 if rows == "short" else length) | global_tokens(3))
    if direction == "forward":
        with torch.no_grad():
            return _median(lambda: attend(q, k, v, pattern, implementation="fused"))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = attend(*leaves, pattern, implementation="fused")
    return _median(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))


def _median(function) -> float:
    return triton.testing.do_bench(function, warmup=5, rep=20, return_mode="median")


def _inputs(heads, length, head_size, dtype, device) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, length, heads, head_size)
    numbers = (torch.randn(shape, generator=generator, device=device) for _ in range(4))
    return [x.to(dtype).transpose(1, 2) for x in numbers]


def _run(inputs, implementation: str) -> dict[str, torch.Tensor]:
    *leaves, dout = inputs
    leaves = [x.detach().requires_grad_() for x in leaves]
    out, lse = attend(*leaves, PATTERN, implementation=implementation)
    grads = torch.autograd.grad((out, lse), leaves, (dout, torch.ones_like(lse)))
    found = (out.detach(), lse.detach(), *grads)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), found, strict=True))


def _distance(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference; infinite if anything is not a number."""
    error = (x.double() - truth).abs().max()
    return float(error) if error.isfinite() else float("inf")
