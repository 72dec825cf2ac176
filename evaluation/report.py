"""The result of an evaluation: one table, and the same numbers for a file."""

import time
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from evaluation.likelihood import Likelihood, likelihood, total
from evaluation.measures import MEASURES, word_perplexity


def score(
    model: nn.Module,
    tokens: np.ndarray,
    starts: np.ndarray,
    units: np.ndarray,
    *,
    context: int,
    stride: int | None,
    batch_tokens: int,
) -> tuple[Likelihood, dict[str, Any]]:
    """Score documents with a sliding window, showing the progress on a terminal.

    Args:
        model, tokens, starts, units: see `likelihood`.
        context: tokens that a window holds.
        stride: tokens by which it moves; None is half the context.
        batch_tokens: tokens of a forward pass.

    Returns:
        The sums, and how they were got: context, stride (if a window moved), tokens a second.

    Raises:
        ValueError: if the window is impossible.
    """
    stride = max(context // 2, 1) if stride is None else stride
    start = time.perf_counter()
    parts = likelihood(
        model, tokens, starts, units, context=context, stride=stride, batch_tokens=batch_tokens
    )
    sums = []
    with tqdm(total=len(tokens), unit=" tokens", disable=None, leave=False) as bar:
        for part in parts:
            sums.append(part)
            bar.update(int(part.tokens.sum()))
    seconds = time.perf_counter() - start
    longest = int(np.diff(starts, append=len(tokens)).max())
    settings = {"context": min(context, longest)}
    if longest > context:  # else no window moves
        settings["stride"] = stride
    return total(sums), {**settings, "tokens_per_second": len(tokens) / seconds}


def results(
    sums: Likelihood,
    *,
    measure: str,
    words: int | None,
    tokens: tuple[int, int],
    documents: tuple[int, int],
    note: str | None,
) -> dict[str, Any]:
    """What was measured, and on how much.

    Args:
        sums: over all scored tokens.
        measure: a name of `MEASURES`.
        words: words of the scored text; None where there are no word-level results.
        tokens: how many were read, and how many the split has.
        documents: how many were scored, at least in part, and how many the split has.
        note: what the report must say about the split.
    """
    nats, units = float(sums.nats.sum()), int(sums.units.sum())
    found: dict[str, Any] = {measure: MEASURES[measure](nats, units)}
    if words is not None:
        found |= {"word_perplexity": word_perplexity(nats, words), "words_scored": words}
    unit = measure.removeprefix("bits_per_")
    found[f"{unit}s_scored"] = units
    if unit.startswith("masked_"):  # only some of the tokens that were read
        found["masked_tokens_scored"] = int(sums.tokens.sum())
        found |= dict(zip(("tokens_read", "tokens_in_split"), tokens, strict=True))
    else:
        found |= dict(zip(("tokens_scored", "tokens_in_split"), tokens, strict=True))
    found |= dict(zip(("documents_scored", "documents_in_split"), documents, strict=True))
    return found if note is None else found | {"note": note}


def table(result: dict[str, Any]) -> str:
    """The numbers of one evaluation as aligned text, one a line."""
    shown = {}
    for name, value in result.items():
        counted, _, done = name.rpartition("_")
        if done in ("scored", "read") and (whole := result.get(f"{counted}_in_split")):
            part = "all" if value == whole else f"the first of {whole:,}"
            shown[name] = f"{value:,} ({part})"
        elif name in MEASURES:
            shown[name] = f"{value:.4f}"
        elif isinstance(value, float):
            shown[name] = f"{value:,.2f}" if name == "word_perplexity" else f"{value:,.0f}"
        elif not name.endswith("_in_split"):
            shown[name] = f"{value:,}" if isinstance(value, int) else str(value)
    width = max(map(len, shown))
    return "\n".join(f"{name.replace('_', ' '):{width}}  {value}" for name, value in shown.items())
