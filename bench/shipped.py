"""The configurations of the attention kernels that ship, one by one."""

from kernels.attend import tuning
from kernels.attend.tuning import Config


def shipped_for(card: str) -> list[tuple[str, int, str, Config]]:
    """``(direction, head size, dtype, configuration)``; short and long rows may share one."""
    found = set()
    for dtype, sizes in tuning.shipped().get(card, {}).items():
        for size, of_rows in sizes.items():
            for configs in of_rows.values():
                found |= {(d, int(size), dtype, Config(*c)) for d, c in configs.items()}
    return sorted(found, key=str)
