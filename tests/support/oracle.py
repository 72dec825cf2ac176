"""Dense attention from the elementwise definition of a pattern: what every kernel is judged by."""

import torch
from torch import Tensor

from kernels.patterns import Pattern


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale=None):
    """``(out, lse)`` in the dtype of the inputs, ``mask`` broadcasting to ``(B, H, Lq, Lk)``."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    score = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    score = score.masked_fill(~mask, float("-inf"))
    seen = mask.any(dim=-1, keepdim=True)
    weight = score.masked_fill(~seen, 0).softmax(dim=-1).masked_fill(~seen, 0)
    return weight @ v, score.logsumexp(dim=-1)


def dense_mask(pattern: Pattern, length: int, heads: int, device="cpu") -> Tensor:
    """``(1, heads, length, length)`` bool."""
    return torch.stack([pattern.dense(length, head, device) for head in range(heads)])[None]


def gradients(function, inputs, *cotangents):
    """The outputs of ``function(*inputs)`` and the gradients of its inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    finite = [torch.where(y.isfinite(), y, 0) for y in outputs]  # lse is -inf where nothing is seen
    grads = torch.autograd.grad(
        finite, inputs, [c.to(y.dtype) for c, y in zip(cotangents, finite, strict=True)]
    )
    return [*outputs, *grads]


def assert_as_exact_as_torch(function, plain, inputs, cotangents, slack: float = 2.0):
    """Fail if ``function`` is further from float64 truth than ``slack`` x plain torch is.

    The allowance comes from the data: ``slack`` times the error that ``plain`` makes in the same
    dtype, one rounding of the result, and a few roundings, in the precision of the sums, of the
    largest number that comes out (a gradient that cancels passed through numbers of that size).
    Compared are the outputs and the gradients of all inputs.
    """
    truth = gradients(plain, [x.double() for x in inputs], *cotangents)
    baseline = gradients(plain, inputs, *cotangents)
    actual = gradients(function, inputs, *cotangents)
    names = ["out", "lse", "dq", "dk", "dv"]
    largest = max(t[t.isfinite()].abs().max() for t in truth if t.isfinite().any())
    dtype = inputs[0].dtype
    sums = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * largest
    for name, t, b, a in zip(names, truth, baseline, actual, strict=True):
        blind = torch.isneginf(t)
        assert torch.equal(torch.isneginf(a), blind), name
        t, b, a = (x.double().masked_fill(blind, 0) for x in (t, b, a))
        rounding = torch.finfo(dtype).eps * t.abs().max()
        allowed = slack * (b - t).abs().max() + rounding + sums
        error = (a - t).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
