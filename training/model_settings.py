"""Settings of a model that change while its weights stay: how one phase follows another."""

from torch import Tensor, nn

_OF_EVERY_MODULE = set(vars(nn.Module()))  # weights, submodules, hooks and the mode


def adopt_settings(model: nn.Module, other: nn.Module) -> None:
    """Give ``model`` the settings of ``other``, module by module; its weights stay as they are.

    Settings are the plain attributes of a module: a dropout, a window, a pattern. Parameters,
    buffers, plain tensors and hooks stay, and compiled modules stay compiled; an attribute that is
    equal is not replaced, because torch.compile may have a graph that depends on it.

    Args:
        model: has weights, and may be training.
        other: the same model made from other settings; it may be on the meta device.

    Raises:
        ValueError: if the two have other modules, or weights with other names or shapes.
    """
    _require_same_weights(model, other)
    for mine, its in zip(model.modules(), other.modules(), strict=True):
        for name, value in vars(its).items():
            if name in _OF_EVERY_MODULE or isinstance(value, Tensor):
                continue
            if name not in vars(mine) or getattr(mine, name) != value:
                setattr(mine, name, value)


def _require_same_weights(model: nn.Module, other: nn.Module) -> None:
    mine, its = _parts(model), _parts(other)
    for name in mine | its:
        before, after = mine.get(name, "nothing"), its.get(name, "nothing")
        if before != after:
            raise ValueError(
                f"the weights of a model go on from phase to phase, but `{name}` would be {after} "
                f"instead of {before}; change only settings that leave them as they are, such as "
                "dropout or a window."
            )


def _parts(model: nn.Module) -> dict[str, str]:
    """Each module by its class, each parameter and buffer by its shape."""
    modules = {name: type(module).__name__ for name, module in model.named_modules()}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return modules | {name: str(tuple(tensor.shape)) for name, tensor in tensors}
