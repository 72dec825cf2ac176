"""Derivatives of every kind are right or refused, and `torch.func` gives what loops give."""

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

from kernels.attend import attend, operator, sdpa
from kernels.attend.call import Call
from kernels.elementwise.qkv import split_heads
from kernels.elementwise.swiglu import swiglu
from kernels.patterns import causal, global_tokens, others, random_blocks, window
from kernels.patterns.tiles import TileList
from tests.kernels.attend.test_attend import inputs
from tests.models.test_models import build
from tests.support.configs import MODELS
from tests.support.oracle import dense_attention, dense_mask

PATTERN = causal() & (window(5) | global_tokens(2) | random_blocks(1, block=4))
LENGTH = 20
REFUSED = "use implementation='reference' for second derivatives"
both = pytest.mark.parametrize("implementation", ["reference", "fused"])
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


@pytest.fixture
def place(implementation, kernel_device):
    return kernel_device if implementation == "fused" else torch.device("cpu")


def small(device="cpu", dtype=torch.float32):
    return inputs(B=1, Hq=2, Hkv=1, L=6, D=3, Dv=2, dtype=dtype, device=device)


def samples(device, count=3):
    """q, k and v of several samples, ``(count, B, H, L, D)``."""
    made = [inputs(Hq=2, Hkv=1, L=LENGTH, D=8, Dv=8, device=device) for _ in range(count)]
    return [torch.stack(x) for x in zip(*made, strict=True)]


def loss(q, k, v, implementation, pattern=PATTERN, **options):
    out, lse = attend(q, k, v, pattern, implementation=implementation, **options)
    return out.square().sum() + lse.sin().sum()


def one_by_one(function, *mapped):
    """The gradients of q, k and v for each sample, by autograd in a loop."""
    found = []
    for q, k, v, *rest in zip(*mapped, strict=True):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        found.append(torch.autograd.grad(function(*leaves, *rest), leaves))
    return tuple(torch.stack(x) for x in zip(*found, strict=True))


# ------------------------------------------------------------------------------ of any order


@pytest.mark.parametrize("pattern", [causal() & window(3), causal() & others()])
def test_the_reference_has_all_derivatives_of_second_order(pattern):
    leaves = [x.requires_grad_() for x in small(dtype=torch.float64)]

    def finite(*x):
        return [torch.where(y.isfinite(), y, 0) for y in attend(*x, pattern)]

    assert torch.autograd.gradcheck(finite, leaves, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(finite, leaves, check_fwd_over_rev=True)


def test_the_reference_has_third_derivatives():
    q, k, v = small(dtype=torch.float64)

    def third(function):
        def squared(f):
            return lambda x: grad(f)(x).square().sum()

        return grad(squared(squared(lambda x: function(x, k, v)[0].pow(3).sum())))(q)

    mask = dense_mask(causal(), 6, 2)
    expected = third(lambda *x: dense_attention(*x, mask))
    torch.testing.assert_close(third(lambda *x: attend(*x, causal())), expected)


def test_a_gradient_penalty_is_that_of_plain_torch():
    penalties = []
    for run in (
        lambda *x: attend(*x, causal())[0],
        lambda *x: dense_attention(*x, dense_mask(causal(), 6, 2))[0],
    ):
        torch.manual_seed(0)
        leaves = [x.requires_grad_() for x in small()]
        (dq,) = torch.autograd.grad(run(*leaves).sum(), leaves[:1], create_graph=True)
        penalties.append(torch.autograd.grad(dq.square().sum(), leaves))
    close(*penalties)


def test_the_kernels_refuse_a_second_derivative_and_not_a_graph_of_the_first(kernel_device):
    leaves = [x.requires_grad_() for x in small(kernel_device)]
    expected = torch.autograd.grad(loss(*leaves, "fused"), leaves)
    actual = torch.autograd.grad(loss(*leaves, "fused"), leaves, create_graph=True)
    close(actual, expected)
    with pytest.raises(RuntimeError, match=REFUSED) as caught:
        actual[0].sum().backward()
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match=REFUSED):
        hessian(lambda q: loss(q, *leaves[1:], "fused"))(leaves[0])


def test_the_lse_of_the_kernel_of_torch_has_a_gradient_and_refuses_its_derivative(kernel_device):
    leaves = [x.requires_grad_() for x in inputs(L=30, Hkv=4, Dv=16, device=kernel_device)]
    expected = torch.autograd.grad(attend(*leaves, causal())[1].sin().sum(), leaves[:2])
    call = Call(causal(), 0.25, torch.float32)
    out, lse = (x.detach() for x in operator.fused.attend(*leaves, *call.flatten()))
    lse = sdpa._LogSumExp.apply(*leaves, out, lse, *call.flatten())
    actual = torch.autograd.grad(lse.sin().sum(), leaves[:2], create_graph=True)
    close(actual, expected)
    with pytest.raises(RuntimeError, match=REFUSED):
        actual[0].sum().backward()


@both
def test_forward_mode_is_right_or_refused(implementation, place):
    x, tangents = small(place), small(place)

    def dual():
        with forward_ad.dual_level():
            out = loss(*map(forward_ad.make_dual, x, tangents), implementation)
            return forward_ad.unpack_dual(out).tangent

    def transform():
        return jvp(lambda *x: loss(*x, implementation), tuple(x), tuple(tangents))[1]

    leaves = [t.clone().requires_grad_() for t in x]
    grads = torch.autograd.grad(loss(*leaves, implementation), leaves)
    expected = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    for run in (dual, transform):
        if implementation == "reference":
            close(run(), expected)
        else:
            with pytest.raises(RuntimeError, match=REFUSED):
                run()


# ------------------------------------------------------------------------------ torch.func


@both
def test_gradients_by_transform_are_those_of_autograd(implementation, place):
    q, k, v = (x[:1] for x in samples(place))
    (expected, *_) = one_by_one(lambda *x: loss(*x, implementation), q, k, v)
    close(grad(loss)(q[0], k[0], v[0], implementation), expected[0])
    value, pull = vjp(lambda q: loss(q, k[0], v[0], implementation), q[0])
    close(pull(torch.ones_like(value))[0], expected[0])


@both
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # by rows beyond the end
def test_whole_jacobians_are_those_of_autograd(implementation, place):
    q, k, v = (x[:, :, :4] for x in small(place))
    function = lambda q: attend(q, k, v, PATTERN, implementation=implementation)  # noqa: E731
    expected = torch.autograd.functional.jacobian(function, q)
    close(jacrev(function)(q), expected)
    close(torch.autograd.functional.jacobian(function, q, vectorize=True), expected)
    out, _ = function(q.requires_grad_())
    rows = torch.eye(out.numel(), device=place).view(-1, *out.shape)
    recorded = vmap(lambda row: torch.autograd.grad(out, q, row, retain_graph=True)[0])(rows)
    close(recorded, expected[0].reshape(-1, *q.shape))


@both
def test_mapped_outputs_are_those_of_a_loop(implementation, place):
    run = partial(attend, pattern=PATTERN, implementation=implementation)
    x = samples(place)
    expected = [torch.stack(y) for y in zip(*map(run, *x), strict=True)]
    close(vmap(run)(*x), tuple(expected))
    moved = x[0].movedim(0, 2), x[1][0], x[2].movedim(0, 1)
    shared = [run(q, x[1][0], v) for q, v in zip(x[0], x[2], strict=True)]
    expected = tuple(torch.stack(y) for y in zip(*shared, strict=True))
    close(vmap(run, in_dims=(2, None, 1))(*moved), expected)
    twice = vmap(vmap(run))(*(t[None] for t in x))
    close(
        twice, tuple(torch.stack([run(*t)[n] for t in zip(*x, strict=True)])[None] for n in (0, 1))
    )


@pytest.mark.slow
@both
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_by_sample_with_documents(implementation, place, shared):
    x = samples(place)
    documents = torch.randint(3, (3, 2, LENGTH), device=place).sort(dim=2).values.int()

    def of_sample(q, k, v, documents):
        return loss(q, k, v, implementation, documents=documents)

    documents = documents[:1].expand_as(documents) if shared else documents
    expected = one_by_one(of_sample, *x, documents)
    gradients = grad(of_sample, argnums=(0, 1, 2))
    if shared:
        close(vmap(gradients, in_dims=(0, 0, 0, None))(*x, documents[0]), expected)
    else:
        close(vmap(gradients)(*x, documents), expected)


@both
@pytest.mark.parametrize("mapped", ["nothing", "positions", "tiles", "positions and tiles"])
def test_gradients_by_sample_with_tiles_and_positions(implementation, place, mapped):
    x = samples(place)
    position = torch.stack([torch.randperm(LENGTH, device=place) for _ in range(3)])
    position = position.int()[:, None, None]
    layout = torch.ones(3, 1, 2, 2, dtype=torch.bool)
    layout[0, 0, 0, 1] = layout[1, 0, 1, 0] = layout[2, 0, 0, 0] = False
    lists = [TileList.from_layout(one, (16, 16)) for one in layout]
    parts = [torch.stack([getattr(t, name) for t in lists]) for name in ("offsets", "keys", "full")]

    def of_sample(q, k, v, position, *parts):
        moved = {"q_position": position, "k_position": position}
        tiles = TileList(*parts, (2, 2), (16, 16))
        return loss(q, k, v, implementation, tiles=tiles, **moved)

    dims = (0, 0, 0, 0 if "positions" in mapped else None, *[0 if "tiles" in mapped else None] * 3)
    given = [y if dim == 0 else y[0] for y, dim in zip((*x, position, *parts), dims, strict=True)]
    each = [
        y if dim == 0 else y[None].expand(3, *y.shape) for y, dim in zip(given, dims, strict=True)
    ]
    actual = vmap(grad(of_sample, argnums=(0, 1, 2)), in_dims=dims)(*given)
    close(actual, one_by_one(of_sample, *each))


def test_hessians_by_sample_with_documents():
    q, k, v = (torch.stack([x, x.flip(2)]) for x in small())
    documents = torch.tensor([[[0, 0, 0, 1, 1, 1]], [[0, 1, 1, 1, 2, 2]]], dtype=torch.int32)

    def of_sample(q, k, v, documents):
        return loss(q, k, v, "reference", documents=documents)

    expected = [hessian(of_sample)(*x) for x in zip(q, k, v, documents, strict=True)]
    close(vmap(hessian(of_sample))(q, k, v, documents), torch.stack(expected))


# ------------------------------------------------------------------------------ models


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_model_by_sample(name, device):
    model = build(name).to(device)
    for parameter in model.parameters():
        if parameter.dim() == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    text = torch.randint(256, (2, 128), device=device)

    def nats(parameters, tokens):
        logits = functional_call(model, parameters, (tokens[None],))
        return torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[1:])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    actual = vmap(grad(nats), in_dims=(None, 0))(parameters, text)
    for n, sample in enumerate(text):
        own = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        expected = torch.autograd.grad(nats(own, sample), list(own.values()))
        for (key, a), e in zip(actual.items(), expected, strict=True):
            torch.testing.assert_close(a[n], e, rtol=1e-3, atol=1e-4, msg=key)


def test_fused_elementwise_kernels_refuse_transforms_in_a_sentence(kernel_device):
    x, gain = torch.randn(1, 5, 24, device=kernel_device), torch.ones(4, device=kernel_device)
    for run in (
        lambda x: swiglu(x, "fused").sum(),
        lambda x: split_heads(x, 2, 8, gains=(gain, gain), implementation="fused")[0].sum(),
    ):
        with pytest.raises(ValueError, match="use 'auto' or 'reference'"):
            grad(run)(x)
        with pytest.raises(ValueError, match="use 'auto' or 'reference'"):
            jvp(run, (x,), (x,))


def test_a_plain_gradient_makes_no_node_for_its_own(kernel_device, monkeypatch):
    monkeypatch.setattr(operator.transforms, "gradients", lambda *_: pytest.fail("a node was made"))
    leaves = [x.requires_grad_() for x in small(kernel_device)]
    loss(*leaves, "fused").backward()
    loss(*leaves, "reference").backward()
