"""The units in which results are reported, each defined once."""

import math


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """A summed loss as bits per byte of text, comparable across tokenisers.

    Args:
        nats: negative log-likelihood summed over all scored tokens (not averaged), in nats.
        num_bytes: bytes of the text that those tokens stand for.

    Returns:
        Bits per byte; a uniform guess has 8.

    Raises:
        ValueError: if ``num_bytes`` is not positive.

    Source:
        Al-Rfou et al. 2018, arXiv:1808.04444, section 4; "bits per character" on enwik8 and text8
        are bits per byte.
    """
    if num_bytes <= 0:
        raise ValueError(f"bits per byte needs some text, got num_bytes={num_bytes}.")
    return nats / math.log(2) / num_bytes
