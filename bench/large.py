"""Attention over tensors of more than 2**31 elements each: do addresses wrap around?

q, k and v are views of one buffer, as a merged projection leaves them. Some slices are computed
again from tensors of their own, and must be equal bit by bit. Needs about 40 GiB.
"""

import torch
from torch import Tensor

from kernels.attend import attend
from kernels.patterns import Pattern, causal, global_tokens, strided, window

HEAD_SIZE = 64
PATTERNS = (
    causal() & (window(150) | global_tokens(3)),  # rows that are cut in pieces
    causal() & (window(128) | strided(128)),  # tokens in residue classes, through pointers
)
# (batch, tokens, heads), and the dimension that is sliced: far batches, then far tokens.
SHAPES = (((33, 65_536, 16), 0), ((1, 2**20, 33), 1))


def check(device: torch.device) -> int:
    """Number of cases with a slice that differs."""
    bad = 0
    for pattern in PATTERNS:
        for shape, dim in SHAPES:
            different = _differing(pattern, shape, dim, device)
            bad += bool(different)
            verdict = f"DIFFERENT: {', '.join(different)}" if different else "equal"
            print(f"large {shape} {pattern}: {verdict}", flush=True)
            torch.cuda.empty_cache()
    return bad


def _differing(pattern: Pattern, shape: tuple, dim: int, device: torch.device) -> list[str]:
    batch, length, heads = shape
    generator = torch.Generator(device).manual_seed(0)
    buffer = torch.empty(batch, length, 3, heads, HEAD_SIZE, dtype=torch.bfloat16, device=device)
    buffer.normal_(generator=generator)
    q, k, v = (x.transpose(1, 2) for x in buffer.unbind(2))
    assert q.numel() > 2**31
    dout = torch.empty(batch, length, heads, HEAD_SIZE, dtype=torch.bfloat16, device=device)
    dout = dout.normal_(generator=generator).transpose(1, 2)
    whole = _results(pattern, q, k, v, dout)
    different = []
    last = q.shape[dim] - 1
    for n in (0, last // 2, last):
        own = [_own_memory(x.narrow(dim, n, 1)) for x in (q, k, v, dout)]
        for name, x in _results(pattern, *own).items():
            if not torch.equal(x, whole[name].narrow(dim, n, 1)):
                different.append(f"{name} of slice {n}")
    return different


def _own_memory(x: Tensor) -> Tensor:
    """A copy in ``(B, L, H, D)`` memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _results(pattern: Pattern, q, k, v, dout) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, pattern, implementation="fused")
    grads = torch.autograd.grad(out, leaves, dout)
    names = ("out", "lse", "dq", "dk", "dv")
    return dict(zip(names, (out.detach(), lse.detach(), *grads), strict=True))
