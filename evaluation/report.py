"""The result of an evaluation: one table, and the same numbers for a file."""

import time
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from evaluation.likelihood import likelihood, total
from evaluation.measures import bits_per_byte


def score(
    model: nn.Module,
    tokens: np.ndarray,
    *,
    context: int,
    stride: int | None,
    limit: int | None,
    batch_tokens: int,
) -> dict[str, Any]:
    """Score a split of bytes with a sliding window, showing the progress on a terminal.

    Args:
        model: has ``loss(inputs, targets)`` and ``vocab_size``.
        tokens: the split, one token a byte.
        context: tokens that a window holds.
        stride: tokens by which it moves; None is half the context.
        limit: score only the first tokens; None is all.
        batch_tokens: tokens of a forward pass.

    Raises:
        ValueError: if the limit is not positive, or the window is impossible.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 token, got {limit}; null scores all.")
    stride = max(context // 2, 1) if stride is None else stride
    scored = tokens[:limit]
    start = time.perf_counter()
    parts = []
    with tqdm(total=len(scored), unit=" bytes", disable=None, leave=False) as bar:
        for part in likelihood(
            model, scored, context=context, stride=stride, batch_tokens=batch_tokens
        ):
            parts.append(part)
            bar.update(part.tokens)
    result = total(parts)
    return {
        "bits_per_byte": bits_per_byte(result.nats, result.tokens),
        "bytes_scored": result.tokens,
        "bytes_in_split": len(tokens),
        "context": min(context, len(scored)),
        "stride": stride,
        "tokens_per_second": result.tokens / (time.perf_counter() - start),
    }


def table(result: dict[str, Any]) -> str:
    """The numbers of one evaluation as aligned text, one a line."""
    rows = dict(result)
    total_bytes = rows.pop("bytes_in_split")
    share = "all" if rows["bytes_scored"] == total_bytes else f"the first of {total_bytes:,}"
    shown = {
        **rows,
        "bits_per_byte": f"{rows['bits_per_byte']:.4f}",
        "bytes_scored": f"{rows['bytes_scored']:,} ({share})",
        "context": f"{rows['context']:,}",
        "stride": f"{rows['stride']:,}",
        "tokens_per_second": f"{rows['tokens_per_second']:,.0f}",
    }
    width = max(map(len, shown))
    return "\n".join(f"{name.replace('_', ' '):{width}}  {value}" for name, value in shown.items())
