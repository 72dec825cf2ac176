"""The units in which results are reported, each defined once."""

import math

import numpy as np


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
    return _bits_per("bytes", nats, num_bytes)


def bits_per_dim(nats: float, num_dims: int) -> float:
    """A summed loss as bits per dimension of images.

    Args:
        nats: negative log-likelihood summed over all scored tokens (not averaged), in nats.
        num_dims: values that those tokens stand for: one for each channel of each pixel.

    Returns:
        Bits per dimension; a uniform guess over 256 levels has 8.

    Raises:
        ValueError: if ``num_dims`` is not positive.

    Source:
        van den Oord et al. 2016, arXiv:1601.06759, section 5.1.
    """
    return _bits_per("dims", nats, num_dims)


def bits_per_masked_byte(nats: float, num_bytes: int) -> float:
    """A summed loss of masked tokens as bits per byte that was masked.

    Not to be compared with bits per byte: what is masked is predicted from both sides, and says
    nothing of how well the text could be compressed.

    Args:
        nats: negative log-likelihood summed over all scored tokens (not averaged), in nats.
        num_bytes: bytes of the text that those tokens stand for, and no others.

    Returns:
        Bits per masked byte; a uniform guess over single bytes has 8.

    Raises:
        ValueError: if ``num_bytes`` is not positive.

    Source:
        "MLM BPC" of Longformer (Beltagy et al. 2020, arXiv:2004.05150, section 5) and BigBird
        (Zaheer et al. 2020, arXiv:2007.14062, appendix E.1).
    """
    return _bits_per("masked bytes", nats, num_bytes)


def bits_per_masked_dim(nats: float, num_dims: int) -> float:
    """A summed loss of masked values of images as bits per value; see `bits_per_masked_byte`."""
    return _bits_per("masked dims", nats, num_dims)


def word_perplexity(nats: float, words: int) -> float:
    """Perplexity of a word, whatever the tokens: 2 to the power of total bits over words.

    Args:
        nats: negative log-likelihood summed over all tokens of a text, line ends and spaces too.
        words: `str.split()` items of that very text.

    Returns:
        At least 1; infinite beyond the range of float64.

    Raises:
        ValueError: if ``words`` is not positive.

    Source:
        PG-19, Rae et al. 2020, arXiv:1911.05507, section 4.3.
    """
    with np.errstate(over="ignore"):
        return float(np.exp2(_bits_per("words", nats, words)))


MEASURES = {
    "bits_per_byte": bits_per_byte,
    "bits_per_dim": bits_per_dim,
    "bits_per_masked_byte": bits_per_masked_byte,
    "bits_per_masked_dim": bits_per_masked_dim,
}


def _bits_per(unit: str, nats: float, count: int) -> float:
    if count <= 0:
        raise ValueError(f"a loss is reported over some {unit}, got {count} {unit}.")
    return nats / math.log(2) / count
