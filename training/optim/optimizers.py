"""Optimizers, made from a model: AdamW, or Muon for the hidden matrices and AdamW for the rest."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from training.optim.muon import BatchedMuon


def adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float, eps: float
) -> Optimizer:
    """AdamW that decays matrices only: neither embeddings nor vectors (norms, biases).

    Raises:
        ValueError: if a number is out of its range.
    """
    _check(lr=lr, weight_decay=weight_decay, eps=eps)
    _check_shares(betas=betas)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, kept = _split(model, lambda _, p: p.dim() >= 2 and id(p) not in embeddings)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept}]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, lr=lr, betas=tuple(betas), weight_decay=0.0, eps=eps, fused=_fused(model))


def muon(
    model: nn.Module,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    adamw_lr: float,
    adamw_betas: tuple[float, float],
    adamw_eps: float,
) -> Optimizer:
    """Muon for the matrices inside ``model.blocks``; AdamW without decay for everything else.

    The embedding and the output head are matrices too, but their rows are looked up or predicted
    one by one: orthogonalising their update does not help (section 2 of the source).

    Raises:
        ValueError: if a number is out of its range.

    Source:
        Muon: Jordan et al. 2024, kellerjordan.github.io/posts/muon.
    """
    _check(lr=lr, weight_decay=weight_decay, adamw_lr=adamw_lr, adamw_eps=adamw_eps)
    _check_shares(momentum=[momentum], adamw_betas=adamw_betas)
    matrices, rest = _split(model, lambda name, p: name.startswith("blocks.") and p.dim() == 2)
    return Combined(
        BatchedMuon(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay),
        AdamW(
            rest,
            lr=adamw_lr,
            betas=tuple(adamw_betas),
            weight_decay=0.0,
            eps=adamw_eps,
            fused=_fused(model),
        ),
    )


class Combined(Optimizer):
    """Several optimizers over disjoint parameters, to the outside one (Lightning accepts only one).

    The parts see the very dictionaries ``param_groups`` and ``state`` of this object. Schedules,
    ``zero_grad``, ``state_dict`` and ``load_state_dict`` of the base class therefore just work.
    Where all parts take ``found_inf`` (see `torch.amp.GradScaler`), so does this object; parts are
    also told whether processes hold ``replicated`` parameters (`BatchedMuon`).
    """

    def __init__(self, *parts: Optimizer):
        self.parts = parts
        self.replicated = False
        self.found_inf: Tensor | None = None
        self._step_supports_amp_scaling = all(
            getattr(part, "_step_supports_amp_scaling", False) for part in parts
        )
        super().__init__([group for part in parts for group in part.param_groups], defaults={})
        self._share()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # `load_state_dict` ends here, with new groups and a new state
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update the parameters; ``closure``, if any, computes the loss and its gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.found_inf, part.replicated = self.found_inf, self.replicated
            part.step()
        return loss

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            own = list(islice(groups, len(part.param_groups)))
            part.__setstate__({"param_groups": own, "state": self.state})


def _check(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"optimizer.{name} must be at least 0 and finite, got {value}.")


def _check_shares(**shares: Sequence[float]) -> None:
    """Decay rates of running means must lie in [0, 1)."""
    for name, values in shares.items():
        for value in values:
            if not 0 <= value < 1:
                raise ValueError(f"optimizer.{name} must be at least 0 and below 1, got {value}.")


def _split(
    model: nn.Module, condition: Callable[[str, nn.Parameter], bool]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters that meet the condition, and the others."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    chosen = [p for name, p in parameters if condition(name, p)]
    others = [p for name, p in parameters if not condition(name, p)]
    return chosen, others


def _fused(model: nn.Module) -> bool | None:
    """One kernel for all parameters on a GPU; on a CPU what torch chooses."""
    parameters: Iterable[nn.Parameter] = model.parameters()
    return True if next(iter(parameters)).is_cuda else None
