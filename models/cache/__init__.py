"""What generation keeps of the tokens before: a cache for each layer, and the cache of a model."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


class LayerCache(ABC):
    """What one layer keeps. Its attention makes it, fills it and reads it.

    The first pass fills it with all tokens that there are. Each later pass takes one token, after
    `Cache.advance`. What differs between later passes must be in tensors that stay where they are,
    and `step` must neither read nor change anything on the host: then a pass can be captured as a
    CUDA graph. A second `step` with the same token must change nothing.
    """

    tokens = 0  # that `fill` took; 0 before

    @abstractmethod
    def fill(self, *tensors: Tensor) -> None:
        """Take what later tokens need of the first ones, and set ``tokens``."""

    @abstractmethod
    def step(self, *tensors: Tensor) -> Tensor:
        """Take the next token, and return what the layer computes for it."""

    def advance(self) -> list[tuple[Tensor, Tensor]]:
        """What changes with the next token: pairs of a tensor and what to copy into it.

        A layer that needs the number of the token alone has it in `Context.positions`.
        """
        return []


class Cache:
    """What decoding keeps of a sequence: the caches of all layers, and the place of its next token.

    The first pass takes as many tokens as there are. Before each later one, which takes a single
    token, comes `advance`.

    Args:
        layers: the cache of each layer, from the first up; they may be of different kinds.
    """

    def __init__(self, layers: Sequence[LayerCache]):
        self.layers = layers
        self.position: int | Tensor = 0  # of the first token of a pass; a tensor () once started

    @property
    def started(self) -> bool:
        """Whether the first pass is over."""
        return isinstance(self.position, Tensor)

    def start(self, tokens: int, device: torch.device) -> None:
        """End the first pass, which took so many tokens.

        Raises:
            RuntimeError: if a layer has not kept them.
        """
        for number, layer in enumerate(self.layers, start=1):
            if layer.tokens != tokens:
                raise RuntimeError(
                    f"layer {number} did not fill its {type(layer).__name__} with the {tokens} "
                    f"tokens of the first pass, got {layer.tokens}; its attention must call `fill` "
                    f"of `context.cache`, and `step` afterwards."
                )
        self.position = torch.full((), tokens - 1, device=device)

    def advance(self) -> None:
        """Go on to the next token."""
        self.position += 1
        changes = defaultdict(list)
        for layer in self.layers:
            for kept, new in layer.advance():
                changes[kept.dtype].append((kept, new))
        for pairs in changes.values():  # one launch for all layers
            kept, new = zip(*pairs, strict=True)
            torch._foreach_copy_(kept, new)
