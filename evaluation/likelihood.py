"""Likelihood of a whole split with a sliding window: every token is scored exactly once."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Window:
    """Tokens ``start`` to ``stop`` are predicted in one pass; those from ``scored`` on count.

    ``document`` is the first token of the document that all of them are in.
    """

    document: int
    start: int
    scored: int
    stop: int


@dataclass(frozen=True)
class Likelihood:
    """Sums over scored tokens, by their position in the window.

    Args:
        nats: negative log-likelihood ``(context,)`` float64.
        units: bytes or dimensions that the tokens stand for, ``(context,)`` int64.
        tokens: how many they are, ``(context,)`` int64.
    """

    nats: np.ndarray
    units: np.ndarray
    tokens: np.ndarray


def sliding_windows(starts: Iterable[int], tokens: int, context: int, stride: int):
    """Windows that score each of ``tokens`` exactly once and stay inside one document each.

    The first window of a document scores all it holds; each later one moves on by ``stride`` and
    scores the tokens that are new, so that they see at least ``context - stride`` tokens before
    them. The last window ends with the document and is as long as the others.

    Args:
        starts: first token of each document, ascending from 0.

    Raises:
        ValueError: unless ``1 <= stride <= context`` and there are tokens.
    """
    if not 1 <= stride <= context or tokens < 1:
        raise ValueError(
            f"a sliding window needs 1 <= stride <= context and some text, got stride={stride}, "
            f"context={context} and {tokens} tokens; change `stride` or `context`."
        )
    return _sliding_windows(starts, tokens, context, stride)


def _sliding_windows(
    starts: Iterable[int], tokens: int, context: int, stride: int
) -> Iterator[Window]:
    for document, end in itertools.pairwise([*starts, tokens]):
        scored = document
        while scored < end:
            stop = min(scored + (context if scored == document else stride), end)
            yield Window(document, max(stop - context, document), scored, stop)
            scored = stop


@torch.inference_mode()
def likelihood(
    model: nn.Module,
    tokens: np.ndarray,
    starts: np.ndarray,
    units: np.ndarray,
    *,
    context: int,
    stride: int,
    batch_tokens: int,
) -> Iterator[Likelihood]:
    """Score ``tokens`` batch by batch; add the results up with ``total``.

    Args:
        model: has ``nats(inputs, targets) -> (B, L)`` and ``vocab_size`` (the start id).
        tokens: token ids ``(N,)``.
        starts: first token of each document, which is predicted from the start id alone.
        units: bytes or dimensions that each token id stands for, ``(vocab_size,)``.
        context: tokens that a window holds.
        stride: tokens by which it moves; 1 gives every token the fullest context, at the most cost.
        batch_tokens: tokens of a forward pass, at least one window.
    """
    device = next(model.parameters()).device
    windows = sliding_windows(starts, len(tokens), context, stride)
    while batch := list(itertools.islice(windows, max(batch_tokens // context, 1))):
        # A row is of one document, and the model is causal: no token sees the padding behind it.
        rows = [_row(tokens, window, model.vocab_size) for window in batch]
        rows = pad_sequence(rows, batch_first=True, padding_value=-1)
        targets = rows[:, 1:].clone()
        for target, window in zip(targets, batch, strict=True):
            target[: window.scored - window.start] = -1
        nats = model.nats(rows[:, :-1].clamp(min=0).to(device), targets.to(device))
        yield by_position(nats.double().cpu().numpy(), targets.numpy(), units, context)


def total(parts: Iterable[Likelihood]) -> Likelihood:
    """The sum of all sums: never a mean of means."""
    parts = list(parts)
    return Likelihood(
        *(sum(getattr(p, name) for p in parts) for name in ("nats", "units", "tokens"))
    )


def by_position(
    nats: np.ndarray, targets: np.ndarray, units: np.ndarray, context: int
) -> Likelihood:
    """Sums over the windows of a batch, ``(B, L)`` each; a target of -1 is not scored."""
    scored = targets >= 0
    units = np.where(scored, units[targets], 0)
    sums = (nats.sum(axis=0), units.sum(axis=0), scored.sum(axis=0))
    # Shorter only if all documents of the batch are.
    return Likelihood(*(np.pad(s, (0, context - len(s))) for s in sums))


def _row(tokens: np.ndarray, window: Window, start_id: int) -> Tensor:
    """The token before the window, or the start id, then the window: int64."""
    before = start_id if window.start == window.document else tokens[window.start - 1]
    row = np.empty(window.stop - window.start + 1, dtype=np.int64)
    row[0], row[1:] = before, tokens[window.start : window.stop]
    return torch.from_numpy(row)
