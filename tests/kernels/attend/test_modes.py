"""`attend` in the modes of torch: inference, meta and fake tensors, compilation, autocast."""

import contextlib
from itertools import count

import pytest
import torch
from torch import library
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.func import grad, vmap

from kernels.attend import attend
from kernels.attend.call import Call
from kernels.patterns import blocks, causal, global_tokens, random_blocks, strided, window
from kernels.patterns.retention import cache_plan
from kernels.patterns.tiles import TileList
from tests.kernels.attend.test_attend import inputs
from tests.models.test_models import build, tokens
from tests.support.configs import MODELS

both = pytest.mark.parametrize("implementation", ["reference", "fused"])
_seed = count(1000)


def new_pattern():
    """One that no cache knows."""
    drawn = random_blocks(1, block=4, seed=next(_seed))
    return causal() & (window(5) | drawn | strided(7) | blocks("x.../xx../.xx./x.xx", block=6))


@pytest.fixture
def place(implementation, kernel_device):
    return kernel_device if implementation == "fused" else torch.device("cpu")


# ------------------------------------------------------------------------------ what is kept


@contextlib.contextmanager
def inside_grad():
    with torch._functorch.eager_transforms.grad_increment_nesting():
        yield


@both
@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode,
        FakeTensorMode,
        lambda: torch.device("meta"),
        torch.no_grad,
        inside_grad,
    ],
)
def test_a_pattern_first_used_in_any_mode_can_be_trained_afterwards(mode, implementation, place):
    pattern = new_pattern()
    with mode():
        q, k, v = inputs(B=1, L=24, D=8, Dv=8, device=place)
        attend(q, k, v, pattern, implementation=implementation)
        pattern.keys_per_query(24, 4)
        cache_plan(pattern, 4, 24)
    leaves = [x.requires_grad_() for x in inputs(B=1, L=24, D=8, Dv=8, device=place)]
    out, lse = attend(*leaves, pattern, implementation=implementation)
    actual = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    out, lse = attend(*leaves, pattern, implementation="reference")
    expected = torch.autograd.grad(out.sum() + lse.sum(), leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    plan = cache_plan(pattern, 4, 24)
    for x in (pattern.encoded, plan.last, plan.slot, plan.kept):
        assert not x.is_inference()
        assert type(x) is torch.Tensor
        assert x.device.type == "cpu"


@both
def test_a_pattern_first_used_under_a_transform_can_be_trained_afterwards(implementation, place):
    pattern = new_pattern()
    q, k, v = inputs(B=2, Hq=2, Hkv=1, L=12, D=8, Dv=8, device=place)

    def loss(q, k, v):
        return attend(q, k, v, pattern, implementation=implementation)[0].square().sum()

    first = vmap(grad(loss))(q[:, None], k[:, None], v[:, None])[:, 0]
    q.requires_grad_()
    (dq,) = torch.autograd.grad(loss(q, k, v), q)
    torch.testing.assert_close(first, dq, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------ without numbers


def check_shapes(implementation, device, dtype=torch.bfloat16, pattern=None, **given):
    q, k, v = inputs(L=40, D=16, Dv=8, dtype=dtype, device=device)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    pattern = pattern or new_pattern()
    out, lse = attend(*leaves, pattern, implementation=implementation, **given)
    assert out.shape == (2, 4, 40, 8)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (out.sum() + lse.sum()).backward()
    for x in leaves:
        assert type(x.grad) is type(out)
        assert x.grad.shape == x.shape
    return [(x.shape, x.stride(), x.dtype) for x in (out, lse, *(x.grad for x in leaves))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_meta_tensors_have_the_shapes_and_strides_of_real_ones(dtype):
    assert check_shapes("auto", "meta", dtype) == check_shapes("auto", "cpu", dtype)
    documents = torch.zeros(2, 40, dtype=torch.int32, device="meta")
    check_shapes("auto", "meta", dtype, documents=documents)
    listed = TileList.from_layout(torch.ones(1, 3, 3, dtype=torch.bool), (16, 16))
    parts = [x.to("meta") for x in (listed.offsets, listed.keys, listed.full)]
    position = torch.zeros(1, 1, 40, dtype=torch.int32, device="meta")
    tiles = TileList(*parts, listed.shape, listed.tile)
    check_shapes("auto", "meta", dtype, q_position=position, k_position=position, tiles=tiles)


@both
def test_fake_tensors_have_the_shapes_and_strides_of_real_ones(implementation, place):
    real = check_shapes(implementation, place)
    with FakeTensorMode():
        assert check_shapes(implementation, place) == real
    mode = FakeTensorMode()
    q, k, v = (mode.from_tensor(x) for x in inputs(L=40, device=place))
    for pattern in (new_pattern(), causal()):
        out, _ = attend(q, k, v, pattern, implementation=implementation)  # outside of the mode
        assert isinstance(out, FakeTensor)


@pytest.mark.parametrize("pattern", [causal(), new_pattern()])
def test_fake_tensors_may_be_on_a_card_that_is_not_there(pattern):
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(1, 2, 64, 32, dtype=torch.bfloat16, device="cuda")
        out, lse = attend(x, x, x, pattern)
    assert out.shape == x.shape
    assert out.device.type == lse.device.type == "cuda"


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_built_and_trained_on_meta_tensors(name):
    with torch.device("meta"):
        model = build(name)
    text = tokens("meta")
    nats, scored = model.loss(text, text)
    (nats / scored).backward()
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in model.parameters())


# ------------------------------------------------------------------------------ compiled


@both
def test_the_operators_keep_the_rules_of_torch(implementation, place):
    name = "attend" if implementation == "fused" else "attend_reference"
    run = getattr(torch.ops.strider, name).default
    for dtype in (torch.float32, torch.bfloat16):
        x = inputs(B=1, Hq=2, Hkv=1, L=40, D=16, Dv=16, dtype=dtype, device=place)
        q, k, v = (t.requires_grad_() for t in x)
        call = Call(causal() & (window(5) | global_tokens(2)), 0.25, dtype).flatten()
        library.opcheck(run, (q, k, v, *call))
        out, lse = (t.detach() for t in run(q, k, v, *call))
        backward = getattr(torch.ops.strider, f"{name}_backward").default
        fixed = [t.detach() for t in (q, k, v)]
        library.opcheck(backward, (torch.randn_like(out), None, *fixed, out, lse, *call))


@both
def test_a_pattern_never_used_before_compiles_in_one_graph(implementation, place):
    torch._dynamo.reset()
    pattern = new_pattern()
    leaves = [x.requires_grad_() for x in inputs(B=1, L=40, device=place)]

    def loss(q, k, v):
        out, lse = attend(q * 2, k, v, pattern, implementation=implementation)
        return (out * out).sum() + lse.sum()

    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@both
def test_layers_with_windows_of_their_own_share_one_graph(implementation, place):
    torch._dynamo.reset()
    graphs, x = [], inputs(B=1, L=40, device=place)

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    class Layer(torch.nn.Module):
        def __init__(self, window_size):
            super().__init__()
            self.pattern = causal() & window(window_size)
            _ = self.pattern.encoded, self.pattern.is_causal, self.pattern.past_seen_up_to

        def forward(self, q, k, v):
            return attend(q, k, v, self.pattern, implementation=implementation)

    for size in (3, 5, 9, 17):
        layer = Layer(size)
        expected = layer(*x)
        layer.compile(fullgraph=True, backend=backend)
        torch.testing.assert_close(layer(*x), expected)
    assert len(graphs) == 1


def test_an_exported_model_gives_the_same_numbers():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pattern = new_pattern()

        def forward(self, q, k, v):
            return attend(q, k, v, self.pattern)

    model, x = Model(), tuple(inputs(L=40))
    exported = torch.export.export(model, x).module()
    assert all(torch.equal(a, b) for a, b in zip(exported(*x), model(*x), strict=True))


def test_the_reference_is_exact_under_autocast_of_another_dtype():
    q, k, v = inputs(L=40, dtype=torch.float64)
    expected = attend(q, k, v, causal())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = attend(q, k, v, causal())
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
