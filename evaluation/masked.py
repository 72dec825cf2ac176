"""Likelihood of the masked tokens of a split, window by window."""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from evaluation.likelihood import Likelihood, by_position, total


class Windows(Protocol):
    """``windows[numbers]`` is inputs and targets ``(B, 2, L)`` int64; -1 is not scored."""

    def __len__(self) -> int: ...

    def __getitem__(self, numbers: Sequence[int]) -> np.ndarray: ...


@torch.inference_mode()
def score_masked(
    model: nn.Module,
    windows: Windows,
    units: np.ndarray,
    *,
    tokens: int,
    context: int,
    batch_tokens: int,
) -> tuple[Likelihood, dict[str, Any]]:
    """Score the masked tokens of all windows, showing the progress on a terminal.

    Args:
        model: has ``nats(inputs, targets, documents) -> (B, L)`` and ``vocab_size`` (the start
            id, which is also the padding).
        windows: what it sees and what it must find, end to end.
        units: bytes or dimensions that each token id stands for, ``(vocab_size,)``.
        tokens: how many all windows hold, masked or not.
        context: tokens of a window.
        batch_tokens: tokens of a forward pass, at least one window.

    Returns:
        Sums over the masked tokens, and how they were got: context, tokens read a second.
    """
    device = next(model.parameters()).device
    size = max(batch_tokens // context, 1)
    start = time.perf_counter()
    sums = []
    for first in tqdm(range(0, len(windows), size), unit=" passes", disable=None, leave=False):
        batch = windows[range(first, min(first + size, len(windows)))]
        inputs, targets = torch.from_numpy(batch).unbind(1)
        # What follows a start id is another document: no token sees the padding.
        documents = (inputs == model.vocab_size).cumsum(dim=1, dtype=torch.int32)
        nats = model.nats(*(x.to(device) for x in (inputs, targets, documents)))
        sums.append(by_position(nats.double().cpu().numpy(), targets.numpy(), units, context))
    seconds = time.perf_counter() - start
    return total(sums), {"context": min(context, tokens), "tokens_per_second": tokens / seconds}
