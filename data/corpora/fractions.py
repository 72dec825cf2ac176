"""Where a corpus without official splits is cut in three."""

import math
from collections.abc import Sequence


def check_fractions(fractions: Sequence[float]) -> None:
    """Refuse what cannot be the shares of train, validation and test.

    Raises:
        ValueError: if they are not three positive numbers with sum 1.
    """
    if len(fractions) != 3 or min(fractions) <= 0 or not math.isclose(sum(fractions), 1):
        raise ValueError(
            f"data.corpus.fractions must be three positive shares (train, validation, test) "
            f"with sum 1, got {list(fractions)}; for example [0.9, 0.05, 0.05]."
        )


def cuts(size: int, fractions: Sequence[float]) -> tuple[int, int]:
    """Where validation and test begin among ``size`` bytes or documents."""
    train, validation, _ = fractions
    return round(size * train), round(size * (train + validation))
