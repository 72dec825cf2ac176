"""SwiGLU's product: its gradient against float64, and what a compiler sees of it."""

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import library
from torch._dynamo.backends.common import aot_autograd

from kernels.elementwise.swiglu import swiglu
from tests.support.oracle import gradients


def formula(x):
    gate, up = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return [F.silu(gate) * up]


def fused(x):
    return [swiglu(x, implementation="fused")]


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


@DTYPES
@pytest.mark.parametrize("shape", [(2,), (5, 14), (2, 3, 7, 176), (3, 2816)])
def test_outputs_are_those_of_torch_and_gradients_are_the_truth_rounded_once(
    dtype, shape, kernel_device
):
    x = torch.randn(shape, device=kernel_device).mul(3).to(dtype)
    dy = torch.randn(*shape[:-1], shape[-1] // 2, device=kernel_device).to(dtype)
    _, truth = gradients(formula, [x.double()], dy)
    out, dx = gradients(fused, [x], dy)
    assert torch.equal(out, *formula(x))
    assert (dx.dtype, dx.shape) == (dtype, shape)
    rounding = torch.finfo(dtype).eps / 2 * truth.abs() + 1e-6 * truth.abs().max()
    assert ((dx - truth).abs() <= rounding).all()


# exp(100) is inf in float32, and the gradient 1 / inf.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@DTYPES
def test_gates_that_are_wide_open_or_shut_have_finite_gradients(dtype, kernel_device):
    gate = torch.tensor([-100.0, -30.0, 0.0, 30.0, 100.0], device=kernel_device)
    x = torch.cat((gate, torch.full_like(gate, 3.0))).to(dtype)
    _, dx = gradients(fused, [x], torch.full_like(gate, 2.0))
    expected = [0.0, 0.0, 3.0, 6.0, 6.0, 0.0, 0.0, 0.0, 60.0, 200.0]
    assert dx.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0)])
def test_nothing_has_a_gradient_of_its_shape(shape, kernel_device):
    x = torch.zeros(shape, device=kernel_device)
    out, dx = gradients(fused, [x], torch.zeros(*shape[:-1], shape[-1] // 2, device=kernel_device))
    assert (out.shape, dx.shape) == ((*shape[:-1], shape[-1] // 2), shape)


@pytest.mark.parametrize(
    "strange",
    [
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.stack((t, t), dim=-1)[..., 1],
        lambda t: t[:1].expand_as(t),
    ],
)
def test_strides_do_not_matter(strange, kernel_device):
    x, dy = (torch.randn(5, 3, n, device=kernel_device) for n in (48, 24))
    x, dy = strange(x), strange(dy)
    assert not any(t.is_contiguous() for t in (x, dy))
    expected = torch.ops.strider.swiglu_backward(dy.contiguous(), x.contiguous())
    assert torch.equal(torch.ops.strider.swiglu_backward(dy, x), expected)


def test_the_operator_keeps_the_rules_of_torch(kernel_device):
    dy, x = (torch.randn(3, 7, n, device=kernel_device) for n in (10, 20))
    library.opcheck(torch.ops.strider.swiglu_backward.default, (dy, x))
    library.opcheck(torch.ops.strider.swiglu_backward.default, (dy.mT.contiguous().mT, x))


def test_a_compiler_sees_the_forward_pass_and_one_operator_behind_it(kernel_device):
    graphs = []

    def keep(graph, _):
        graphs.append([n.target for n in graph.graph.nodes if n.op == "call_function"])
        return make_boxed_func(graph.forward)

    x, dy = (torch.randn(3, 7, n, device=kernel_device) for n in (20, 10))
    compiled = torch.compile(fused, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    for a, b in zip(gradients(compiled, [x], dy), gradients(fused, [x], dy), strict=True):
        assert torch.equal(a, b)
    forward, backward = graphs
    assert torch.ops.aten.silu.default in forward
    assert backward == [torch.ops.strider.swiglu_backward.default]


def test_compiled_gradients_are_those_of_eager_mode(kernel_device):
    x, dy = (torch.randn(3, 7, n, device=kernel_device) for n in (20, 10))
    compiled = torch.compile(fused, fullgraph=True)
    torch.testing.assert_close(gradients(compiled, [x], dy), gradients(fused, [x], dy))


def test_a_second_derivative_is_right_or_refused(kernel_device):
    x = torch.randn(3, 8, device=kernel_device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: swiglu(x, "reference"), x)
    x = x.detach().float().requires_grad_()
    (dx,) = torch.autograd.grad(swiglu(x, "fused").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"strider\.swiglu_backward"):
        dx.sum().backward()


def test_a_request_that_cannot_be_met_is_refused(kernel_device):
    wide = torch.zeros(1, 4, dtype=torch.float64, device=kernel_device)
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        swiglu(wide, implementation="fused")
    with pytest.raises(ValueError, match="width of 7"):
        swiglu(torch.zeros(1, 7))
