"""Likelihood of a whole split with a sliding window: every token is scored exactly once."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Window:
    """Tokens ``start`` to ``stop`` are predicted in one pass; those from ``scored`` on count."""

    start: int
    scored: int
    stop: int


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood in nats, summed in float64, and the number of tokens it covers."""

    nats: float
    tokens: int


def sliding_windows(tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows that score each of ``tokens`` exactly once.

    The first window scores all it holds; each later one moves on by ``stride`` and scores the
    tokens that are new, so that they see at least ``context - stride`` tokens before them. The last
    window ends with the text and is as long as the others.

    Raises:
        ValueError: unless ``1 <= stride <= context`` and there are tokens.
    """
    if not 1 <= stride <= context or tokens < 1:
        raise ValueError(
            f"a sliding window needs 1 <= stride <= context and some text, got stride={stride}, "
            f"context={context} and {tokens} tokens; change `stride` or `context`."
        )
    scored = 0
    while scored < tokens:
        stop = min(scored + (stride if scored else context), tokens)
        yield Window(max(stop - context, 0), scored, stop)
        scored = stop


@torch.inference_mode()
def likelihood(
    model: nn.Module, tokens: np.ndarray, *, context: int, stride: int, batch_tokens: int
) -> Iterator[Likelihood]:
    """Score ``tokens`` batch by batch; add the results up with ``total``.

    Args:
        model: has ``loss(inputs, targets)`` and ``vocab_size`` (the start id).
        tokens: one stream of token ids; the first one is predicted from the start id.
        context: tokens that a window holds.
        stride: tokens by which it moves; 1 gives every token the fullest context, at the most cost.
        batch_tokens: tokens of a forward pass, at least one window.
    """
    device = next(model.parameters()).device
    windows = sliding_windows(len(tokens), context, stride)
    while batch := list(itertools.islice(windows, max(batch_tokens // context, 1))):
        # Only the first window can differ in length, when it is the only one.
        rows = torch.stack([_row(tokens, window, model.vocab_size) for window in batch])
        targets = rows[:, 1:].clone()
        for target, window in zip(targets, batch, strict=True):
            target[: window.scored - window.start] = -1
        nats, count = model.loss(rows[:, :-1].to(device), targets.to(device))
        yield Likelihood(float(nats), int(count))


def total(parts: Iterable[Likelihood]) -> Likelihood:
    """The sum of nats and tokens: never a mean of means."""
    parts = list(parts)
    return Likelihood(sum(p.nats for p in parts), sum(p.tokens for p in parts))


def _row(tokens: np.ndarray, window: Window, start_id: int) -> Tensor:
    """The token before the window, or the start id, then the window: int64."""
    before = tokens[window.start - 1] if window.start else start_id
    row = np.empty(window.stop - window.start + 1, dtype=np.int64)
    row[0], row[1:] = before, tokens[window.start : window.stop]
    return torch.from_numpy(row)
