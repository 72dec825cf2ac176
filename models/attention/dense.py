"""Full attention by torch's fastest kernel: the baseline that sparse attention must beat."""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import patterns
from models.attention import Context
from models.attention.pattern import PatternAttention
from models.attention.projections import MakeProjections, Projections

# In the order of preference: cuDNN is the fastest on Hopper; a CPU uses FLASH.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class DenseAttention(PatternAttention):
    """Each token attends to itself and to every token before it, or to all of them.

    Args:
        causal: later tokens are hidden.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layer: int,
        *,
        causal: bool = True,
        projections: MakeProjections = Projections,
    ):
        pattern = patterns.causal() if causal else patterns.full()
        super().__init__(dim, heads, layer, pattern=pattern, projections=projections)

    # Another kernel for the same keys: what is kept, counted and shown is the pattern's.
    is_causal = PatternAttention.is_causal
    cache = PatternAttention.cache
    flops_per_token = PatternAttention.flops_per_token
    visible = PatternAttention.visible

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        if context.documents is not None:  # which torch's kernels cannot do without an L x L mask
            return super().attend(q, k, v, context)
        with sdpa_kernel(BACKENDS, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
