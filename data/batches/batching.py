"""How the tokens of an optimizer step are cut into windows, devices and forward passes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Batching:
    """The numbers of tokens of the optimizer steps from ``first_step`` on.

    Args:
        key: where they stand in the configuration, for messages.
        first_step: optimizer steps done before.
        length: tokens in a window.
        batch_tokens: tokens in an optimizer step, over all devices.
        micro_tokens: most tokens in a forward pass of one device; None: no limit, one pass.

    Raises:
        ValueError: if the numbers do not divide as they must.
    """

    key: str
    first_step: int
    length: int
    batch_tokens: int
    micro_tokens: int | None

    def __post_init__(self):
        key, unit = self.key, f"{self.key}.length"
        require_multiple(unit, self.length, "", 1)
        require_multiple(f"{key}.batch_tokens", self.batch_tokens, unit, self.length)
        if self.micro_tokens is not None:
            require_multiple(f"{key}.micro_tokens", self.micro_tokens, unit, self.length)

    def accumulation(self, world_size: int) -> int:
        """Forward passes of each of ``world_size`` devices in an optimizer step.

        Raises:
            ValueError: if the batch cannot be shared equally.
        """
        key = f"{self.key}.batch_tokens"
        if self.micro_tokens is None or self.batch_tokens <= world_size * self.micro_tokens:
            unit, size = f"devices x {self.key}.length", world_size * self.length
            require_multiple(key, self.batch_tokens, unit, size)
            return 1
        unit, size = f"devices x {self.key}.micro_tokens", world_size * self.micro_tokens
        or_else = f", or {self.key}.micro_tokens=null"
        require_multiple(key, self.batch_tokens, unit, size, or_else)
        return self.batch_tokens // size

    def share(self, rank: int, world_size: int) -> dict[str, int]:
        """Which device this is, and how many rows fit its forward pass."""
        passes = world_size * self.accumulation(world_size)
        micro = self.batch_tokens // self.length // passes
        return {"rank": rank, "world_size": world_size, "micro": micro}


def require_multiple(key: str, value: int, unit: str, size: int, or_else: str = "") -> None:
    """Refuse ``value`` unless it is a positive multiple of ``size``, which is called ``unit``."""
    if value < 1 or value % size:
        multiple = f"a multiple of {unit} = {size}" if unit else "at least 1"
        raise ValueError(
            f"{key} must be {multiple}, got {key}={value}; "
            f"set {key}={max(1, round(value / size)) * size} for example{or_else}."
        )
