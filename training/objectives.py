"""What a model is trained to predict: how a batch becomes inputs and targets."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from models.attention import Attention


class NextToken:
    """Each token is predicted from those before it. A batch is ``(B, L + 1)`` token ids.

    Column 0 is the token before the first target.
    """

    share = 1.0  # of the tokens is scored
    causal = True  # no token may see those after it

    def split(self, batch: Tensor, start_id: int) -> tuple[Tensor, Tensor]:
        """A batch -> inputs and targets ``(B, L)``; a target that is not scored is -1.

        Those are padding (-1 in the batch) and the start ids of other documents.
        """
        targets = batch[:, 1:].masked_fill(batch[:, 1:] == start_id, -1)
        # Padding is an input too, one column later; as an input it may be any token.
        return batch[:, :-1].clamp(min=0), targets

    def length(self, batch: Tensor) -> int:
        """Tokens of a sequence."""
        return batch.shape[1] - 1


@dataclass(frozen=True)
class MaskedToken:
    """Some tokens are predicted from all others. A batch is inputs and targets, ``(B, 2, L)``.

    Args:
        share: of the tokens is scored.
    """

    share: float
    causal = False

    def split(self, batch: Tensor, start_id: int) -> tuple[Tensor, Tensor]:
        """A batch -> inputs and targets ``(B, L)``; a target that is not scored is -1."""
        inputs, targets = batch.unbind(1)
        return inputs, targets

    def length(self, batch: Tensor) -> int:
        """Tokens of a sequence."""
        return batch.shape[2]


def check_attention(
    objective: NextToken | MaskedToken, attentions: Iterable[tuple[str, Attention]]
) -> None:
    """Refuse attention, name and module of each layer, that cannot be trained so.

    Raises:
        ValueError: if one is causal and the objective is not, or the other way round.
    """
    wrong = {name: None for name, made in attentions if made.is_causal != objective.causal}
    if not wrong:
        return
    names = " and ".join(wrong)
    if objective.causal:
        raise ValueError(
            f"the next token is predicted from those before it, but the attention `{names}` sees "
            f"later ones; choose a causal model, or objective=masked_token."
        )
    raise ValueError(
        f"masked tokens are predicted from both sides, but the attention `{names}` is causal; "
        f"choose a bidirectional model, or objective=next_token."
    )
