"""Likelihood of the masked tokens of a split, window by window."""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from evaluation.likelihood import Likelihood, by_position, total


class Batches(Protocol):
    """``batches[numbers]`` is inputs, targets (-1 is not scored) and documents, ``(B, L)`` each."""

    def __len__(self) -> int: ...

    def __getitem__(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]: ...


@torch.inference_mode()
def score_masked(
    model: nn.Module,
    batches: Batches,
    units: np.ndarray,
    *,
    tokens: int,
    context: int,
    batch_tokens: int,
) -> tuple[Likelihood, dict[str, Any]]:
    """Score the masked tokens of all windows, showing the progress on a terminal.

    Args:
        model: has ``nats(inputs, targets, documents) -> (B, L)``.
        batches: windows end to end: what the model sees, and what it must find.
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
    for first in tqdm(range(0, len(batches), size), unit=" passes", disable=None, leave=False):
        batch = batches[range(first, min(first + size, len(batches)))]
        _, targets, _ = batch
        nats = model.nats(*(None if x is None else x.to(device) for x in batch))
        sums.append(by_position(nats.double().cpu().numpy(), targets.numpy(), units, context))
    seconds = time.perf_counter() - start
    return total(sums), {"context": min(context, tokens), "tokens_per_second": tokens / seconds}
