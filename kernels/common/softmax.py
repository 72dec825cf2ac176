"""The online softmax inside kernels, in base 2, and the merge of two of its results."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softmax_step(score, row_max, row_sum, scale):
    """One step of the online softmax over raw scores (M, N).

    Returns the weights, the factor that older sums shrink by, and the new maximum and sum.
    """
    new_max = tl.maximum(row_max, tl.max(score, axis=1))
    safe = tl.where(new_max == float("-inf"), 0.0, new_max) * scale  # no visible key so far
    weight = tl.exp2(score * scale - safe[:, None])
    shrink = tl.exp2(row_max * scale - safe)
    return weight, shrink, new_max, row_sum * shrink + tl.sum(weight, axis=1)


@triton.jit
def merge_pair(out1, lse1, out2, lse2):
    """Attention over the union of two disjoint sets of keys: (M, Dv) and (M,) each."""
    larger = tl.maximum(lse1, lse2)
    safe = tl.where(larger == float("-inf"), 0.0, larger)
    weight1, weight2 = tl.exp2((lse1 - safe) * LOG2_E), tl.exp2((lse2 - safe) * LOG2_E)
    total = weight1 + weight2
    share = 1.0 / tl.where(total > 0, total, 1.0)
    out = out1 * (weight1 * share)[:, None] + out2 * (weight2 * share)[:, None]
    return out, tl.where(total > 0, safe + tl.log2(total) / LOG2_E, float("-inf"))
