"""The pattern algebra: which key ``j`` a query ``i`` sees, declared once for every use.

    >>> pattern = causal() & (window(2) | global_tokens(1))
    >>> print(pattern.draw(5))
    x....
    xx...
    xxx..
    x.xx.
    x..xx

A pattern is an immutable, hashable value that holds no batch data. ``&`` and ``|`` combine
patterns, ``repr`` is canonical text, and ``parse`` reads that text back (the same grammar in yaml).
Each term is a file of ``kernels/patterns/terms``; a new one is such a file, and a line here.
"""

from kernels.patterns.algebra import Pattern
from kernels.patterns.parsing import parse
from kernels.patterns.terms.block_diffusion import block_diffusion
from kernels.patterns.terms.blocks import blocks
from kernels.patterns.terms.causal import causal
from kernels.patterns.terms.dilated import dilated
from kernels.patterns.terms.fixed import fixed, summary
from kernels.patterns.terms.full import full
from kernels.patterns.terms.global_at import global_at
from kernels.patterns.terms.global_tokens import global_tokens
from kernels.patterns.terms.leading_queries import leading_queries
from kernels.patterns.terms.near import near2d, near3d, tiles2d, tiles3d
from kernels.patterns.terms.others import others
from kernels.patterns.terms.per_head import per_head
from kernels.patterns.terms.prefix import prefix
from kernels.patterns.terms.random_blocks import random_blocks
from kernels.patterns.terms.sinks import sinks
from kernels.patterns.terms.strided import strided
from kernels.patterns.terms.window import window
from kernels.patterns.tiles import TileList

__all__ = [
    "Pattern",
    "TileList",
    "block_diffusion",
    "blocks",
    "causal",
    "dilated",
    "fixed",
    "full",
    "global_at",
    "global_tokens",
    "leading_queries",
    "near2d",
    "near3d",
    "others",
    "parse",
    "per_head",
    "prefix",
    "random_blocks",
    "sinks",
    "strided",
    "summary",
    "tiles2d",
    "tiles3d",
    "window",
]
