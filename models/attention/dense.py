"""Full causal attention by torch's fastest kernel: the baseline that sparse attention must beat."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.attend import attend
from kernels.patterns import causal
from models.attention import Context
from models.attention.projections import Projections

# In the order of preference: cuDNN is the fastest on Hopper; a CPU uses FLASH.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class DenseAttention(nn.Module):
    """Each token attends to itself and to every token before it."""

    def __init__(self, dim: int, heads: int, layer: int):
        super().__init__()
        self.projections = Projections(dim, heads)
        self.pattern = causal()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.projections.split(x, context)
        if context.documents is not None:  # which torch's kernels cannot do without an L x L mask
            out, _ = attend(q, k, v, self.pattern, documents=context.documents)
            return self.projections.join(out)
        with sdpa_kernel(BACKENDS, set_priority=True):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.projections.join(out)
