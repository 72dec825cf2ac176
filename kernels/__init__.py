"""Attention patterns, and the operations that execute them.

Legend, for every file below: ``B`` batch, ``H`` heads, ``L`` tokens, ``D`` size of a head. A tensor
is ``(B, H, L, D)`` by shape, with any strides, unless it says otherwise; ``i`` indexes queries and
``j`` keys, in original positions; ``dx`` is the gradient of ``x``.
"""
