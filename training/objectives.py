"""What a model is trained to predict: which attention fits, and how many tokens are scored."""

from collections.abc import Iterable
from dataclasses import dataclass

from models.attention import Attention


class NextToken:
    """Each token is predicted from those before it."""

    scored_fraction = 1.0
    causal = True  # no token may see those after it


@dataclass(frozen=True)
class MaskedToken:
    """Some tokens are predicted from all others.

    Args:
        scored_fraction: share of the tokens that are masked, and therefore scored.
    """

    scored_fraction: float
    causal = False


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
