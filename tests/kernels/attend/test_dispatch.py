"""Which implementation runs, and that none is swapped behind the caller's back."""

import pytest
import torch

from kernels.attend import attend, sdpa
from kernels.common.dispatch import choose
from kernels.common.interpreter import INTERPRETED
from kernels.patterns import causal, full, global_tokens, strided, window
from kernels.patterns.tiles import TileList
from tests.kernels.attend.test_attend import cotangents, inputs
from tests.support.oracle import assert_as_exact_as_torch, dense_attention, dense_mask


@pytest.mark.parametrize(
    ("pattern", "length", "expected"),
    [
        (causal(), 100, causal()),
        (full(), 100, full()),
        (causal() & window(100), 100, causal()),
        (causal() & window(99), 100, None),
        (causal() & (window(5) | global_tokens(100)), 100, causal()),
        (causal() & (window(2, block=64) | global_tokens(3)), 128, causal()),
        (causal() & (window(2, block=64) | global_tokens(3)), 129, None),
        (window(99, 99), 100, full()),
        (window(99, 98), 100, None),
        (strided(1), 100, None),  # equal, but not worth a proof
    ],
)
def test_a_pattern_that_hides_nothing_more_is_recognised(pattern, length, expected):
    assert sdpa.equal_pattern(pattern, length) == expected
    if expected is not None:
        assert torch.equal(pattern.dense(length), expected.dense(length))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's dense kernels run on a GPU")
@pytest.mark.parametrize("pattern", [causal(), full(), causal() & window(500)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dense_kernel_of_torch_gives_output_lse_and_every_gradient(pattern, dtype):
    q, k, v = inputs(B=2, Hq=4, Hkv=4, L=200, D=64, Dv=64, dtype=dtype, device="cuda")
    assert sdpa.can_run(q, k, v, dtype)
    mask = dense_mask(pattern, 200, 4, "cuda")
    assert_as_exact_as_torch(
        lambda *x: attend(*x, pattern),
        lambda *x: dense_attention(*x, mask),
        [q, k, v],
        cotangents(q, v),
    )


def test_auto_is_the_reference_on_a_cpu_and_fused_on_a_gpu():
    assert choose("auto", torch.device("cpu"), torch.float32) == "reference"
    assert choose("auto", torch.device("cuda"), torch.bfloat16) == "fused"
    assert choose("auto", torch.device("cuda"), torch.float64) == "reference"
    assert choose("reference", torch.device("cuda"), torch.bfloat16) == "reference"


def test_what_cannot_run_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="got 'fast'"):
        choose("fast", torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="got torch"):
        choose("fused", torch.device("cuda"), torch.float64)
    if not INTERPRETED:
        with pytest.raises(ValueError, match="needs a GPU, got tensors on cpu"):
            choose("fused", torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_is_not_positive_is_refused(scale):
    q, k, v = inputs(L=8)
    with pytest.raises(ValueError, match=f"must be positive and finite, got {scale}"):
        attend(q, k, v, causal(), scale=scale)


@pytest.mark.parametrize(
    ("options", "given"),
    [({"D": 300}, "D=300"), ({"Dv": 257}, "Dv=257"), ({"tile": (30, 30)}, "30, 30")],
)
def test_what_the_kernel_does_not_take_is_refused_by_it_alone(options, given, kernel_device):
    sizes = {"L": 30, "D": 16, "Dv": 16} | {k: v for k, v in options.items() if k != "tile"}
    q, k, v = inputs(device=kernel_device, **sizes)
    one = torch.ones(1, 1, 1, dtype=torch.bool, device=kernel_device)
    tiles = TileList.from_layout(one, options.get("tile", (32, 32)))
    with pytest.raises(ValueError, match=given):
        attend(q, k, v, causal(), tiles=tiles, implementation="fused")
    attend(q, k, v, causal(), tiles=tiles, implementation="reference")
