"""Queries, keys and values by head: the kernel against float64, and what it means."""

import pytest
import torch
from torch import library

from kernels.elementwise.qkv import split_heads
from tests.support.oracle import gradients

ALL = ("norm-and-rotary", "norm", "rotary")


def case(device, *, B=2, L=37, H=3, D=8, DV=16, kind="norm-and-rotary", dtype=torch.float32):
    """Inputs that require gradients, and the function of them, for a choice of implementation."""
    angle = torch.randn(L, D // 2, device=device)
    rotary = (angle.cos(), angle.sin()) if "rotary" in kind else None
    qkv = torch.randn(B, L, H * (2 * D + DV), device=device, dtype=dtype)
    gains = [torch.rand(D, device=device) + 0.5 for _ in range(2)] if "norm" in kind else []

    def function(implementation):
        def call(qkv, *gains):
            tables = None if rotary is None else tuple(t.to(gains_dtype(qkv)) for t in rotary)
            return split_heads(
                qkv, H, H * D, gains=gains or None, rotary=tables, implementation=implementation
            )

        return call

    cotangents = [torch.randn(B, H, L, d, device=device) for d in (D, D, DV)]
    return function, [qkv, *gains], cotangents


def gains_dtype(qkv):
    return torch.promote_types(qkv.dtype, torch.float32)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1, 2, 2, 1), (2, 37, 3, 8, 16), (1, 70, 2, 24, 40)])
def test_the_kernel_is_as_exact_as_torch(kind, dtype, sizes, kernel_device):
    shape = dict(zip(("B", "L", "H", "D", "DV"), sizes, strict=True))
    function, inputs, cotangents = case(kernel_device, kind=kind, dtype=dtype, **shape)
    wide = [x.double() for x in inputs]
    truth = gradients(function("reference"), wide, *cotangents)
    plain = gradients(function("reference"), inputs, *cotangents)
    fused = gradients(function("fused"), inputs, *cotangents)
    for t, p, f in zip(truth, plain, fused, strict=True):
        assert (f.dtype, f.shape) == (p.dtype, p.shape)
        rounding = torch.finfo(p.dtype).eps * t.abs().max() + 1e-6 * t.abs().max()
        assert (f - t).abs().max() <= 2 * (p - t).abs().max() + rounding


def test_queries_and_keys_have_the_length_of_their_gain_and_keep_it_when_turned(device):
    function, (qkv, *gains), _ = case(device, D=16)
    q, k, _ = function("auto")(qkv, *(torch.full_like(gain, 3.0) for gain in gains))
    for x in (q, k):
        torch.testing.assert_close(
            x.square().mean(-1), torch.full_like(x[..., 0], 9.0), rtol=1e-4, atol=0
        )


def test_scores_of_turned_pairs_depend_on_the_distance_alone(device):
    angle = torch.arange(20.0, device=device)[:, None] * torch.tensor([1.0, 0.1], device=device)
    qkv = torch.randn(1, 1, 12, device=device).expand(1, 20, 12)
    q, k, _ = split_heads(qkv, 1, 4, rotary=(angle.cos(), angle.sin()))
    score = q[0, 0] @ k[0, 0].T
    torch.testing.assert_close(score[5, 3], score[19, 17], rtol=1e-4, atol=1e-4)
    assert not torch.isclose(score[5, 3], score[5, 4])


def test_strides_of_the_gradients_do_not_matter(kernel_device):
    function, inputs, cotangents = case(kernel_device)
    strange = [c.transpose(1, 2).contiguous().transpose(1, 2)[..., ::1] for c in cotangents]
    first = gradients(function("fused"), inputs, *cotangents)
    second = gradients(function("fused"), inputs, *strange)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_the_operator_keeps_the_rules_of_torch(kernel_device):
    _, (qkv, *gains), _ = case(kernel_device, kind="norm")
    inputs = [x.requires_grad_() for x in (qkv, *gains)]
    library.opcheck(torch.ops.strider.split_heads.default, (*inputs, None, None, 3, 24))


def test_a_head_without_whole_pairs_is_refused():
    with pytest.raises(ValueError, match="qk_dim=9 and heads=3"):
        split_heads(torch.zeros(1, 1, 27), 3, 9)
