"""Attention under `torch.func` and in forward mode, and derivatives of its derivatives.

Plain calls do not come here, nor do their gradients (`operator.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.attend.call import NUMBERS, TENSORS, Call


@dataclass(frozen=True, eq=False)
class Operators:
    """An implementation of attention.

    Args:
        attend: ``(q, k, v, *arguments) -> (out, lse)``, the arguments being those of a flat `Call`.
        gradients: ``(dout, dlse, q, k, v, out, lse, *arguments) -> (dq, dk, dv)``.
        formula: ``attend`` of a `Call` in plain torch, for all other derivatives; None: refused.
        prepare: what it makes of the arguments and a device first.
    """

    attend: Callable[..., tuple[Tensor, Tensor]]
    gradients: Callable[..., tuple[Tensor, Tensor, Tensor]]
    formula: Callable[..., tuple[Tensor, Tensor]] | None
    prepare: Callable[[tuple, torch.device], tuple]


def attend(operators: Operators, q: Tensor, k: Tensor, v: Tensor, *arguments):
    """``(out, lse)``, which every transform takes."""
    step = Step(operators, 0, arguments[:NUMBERS])
    return _Derivative.apply(step, q, k, v, None, None, *arguments[NUMBERS:])


def gradients(operators: Operators, dout, dlse, q, k, v, out, lse, *arguments):
    """``(dq, dk, dv)``, which every transform takes, and of which derivatives may be asked."""
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    step = Step(operators, 1, arguments[:NUMBERS])
    return _Derivative.apply(step, dout, dlse, q, k, v, out, lse, *arguments[NUMBERS:])


@dataclass(frozen=True, eq=False)
class Step:
    """Attention (order 0), its gradients (1), the gradients of those (2) ...

    A step takes the cotangents of what the step before gives, and what that takes: ``q, k, v``;
    ``dout, dlse, q, k, v``; and so on. Behind these come ``out, lse`` and the tensors of the call.
    """

    operators: Operators
    order: int
    numbers: tuple

    @property
    def taken(self) -> int:
        return _taken(self.order)

    def next(self) -> "Step":
        """The gradients of this step.

        Raises:
            RuntimeError: if the implementation has none.
        """
        if self.order and self.operators.formula is None:
            raise RuntimeError(
                "the fused kernels have first derivatives in reverse mode alone; use "
                "implementation='reference' for second derivatives and for forward mode."
            )
        return replace(self, order=self.order + 1)

    def run(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        taken, (out, lse, *rest) = tensors[: self.taken], tensors[self.taken :]
        arguments = self.operators.prepare((*self.numbers, *rest), taken[0].device)
        if self.order == 0:
            return self.operators.attend(*taken, *arguments)
        if self.order == 1:
            # Kernels take any strides but those of the lse, which is their own.
            return self.operators.gradients(*taken, out, lse.contiguous(), *arguments)
        call = Call.rebuild(*arguments)
        derived = _derived(lambda *x: self.operators.formula(*x, call), self.order)
        with torch.autocast(taken[0].device.type, enabled=False):
            return derived(*taken)


def _taken(order: int) -> int:
    """Tensors that a step takes; of these the first ``_taken(order - 2)`` are cotangents."""
    return order + 3 if order < 1 else _taken(order - 1) + _taken(order - 2)


def _derived(formula: Callable, order: int) -> Callable:
    if order == 0:
        return formula
    before, cotangents = _derived(formula, order - 1), _taken(order - 2)

    def pulled_back(*taken):
        _, pull = torch.func.vjp(before, *taken[cotangents:])
        return pull(taken[:cotangents])

    return pulled_back


class _Derivative(torch.autograd.Function):
    """A step, which takes ``(step, what it takes, out, lse, tensors of the call)``."""

    @staticmethod
    def forward(step: Step, *tensors):
        return step.run(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.step, *tensors = inputs
        if ctx.step.order == 0:
            tensors[3:5] = output
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        tensors = ctx.saved_tensors
        grads = _Derivative.apply(ctx.step.next(), *cotangents, *tensors)
        return None, *grads, *(None for _ in tensors[ctx.step.taken :])

    @staticmethod
    def jvp(ctx, _, *tangents):
        # Gradients are linear in their cotangents, so that the gradient of the gradient with
        # respect to these is the derivative of the step itself, whatever they are.
        step, tensors = ctx.step, ctx.saved_tensors
        results = tensors[3:5] if step.order == 0 else tensors[_taken(step.order - 2) : step.taken]
        tangents = [
            torch.zeros_like(x) if tangent is None else tangent
            for x, tangent in zip(tensors[: step.taken], tangents, strict=False)
        ]
        cotangents = map(torch.zeros_like, results)
        found = _Derivative.apply(step.next().next(), *tangents, *cotangents, *tensors)
        return found[: len(results)]

    @staticmethod
    def vmap(info, in_dims, step: Step, *tensors):
        """The mapped dimension joins the batch; tile lists have none, and run one by one."""
        dims, size, text = in_dims[1:], info.batch_size, step.taken + 2
        if any(dim is not None for dim in dims[text + TENSORS :]):
            found = [
                _Derivative.apply(step, *map(_sample, tensors, dims, [n] * len(dims)))
                for n in range(size)
            ]
            return tuple(map(torch.stack, zip(*found, strict=True))), 0
        batch = len(_sample(tensors[0], dims[0], 0))
        has_batch = [n < text + TENSORS and n != text for n in range(len(tensors))]
        joined = (
            _joined(x, dim, size, batch) if joins and x is not None else x
            for x, dim, joins in zip(tensors, dims, has_batch, strict=True)
        )
        found = _Derivative.apply(step, *joined)
        return tuple(x.unflatten(0, (size, batch)) for x in found), 0


def _sample(x: Tensor | None, dim: int | None, number: int) -> Tensor | None:
    return x if dim is None else x.select(dim, number)


def _joined(x: Tensor, dim: int | None, size: int, batch: int) -> Tensor:
    """``(batch | 1, ...)``, mapped over ``dim`` -> ``(size * batch, ...)``."""
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(-1, batch, *x.shape[2:]).flatten(0, 1)
