"""What a run says on the console."""

import logging
import sys

from lightning.pytorch.utilities import rank_zero_only

LOGGERS = ("strider", "data")  # `data` stands alone and has a logger of its own


def show_log() -> None:
    """Print the lines of our loggers, from the first process only."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for log in map(logging.getLogger, LOGGERS):
        log.setLevel(logging.INFO)
        log.propagate = False
        if rank_zero_only.rank == 0 and not log.handlers:
            log.addHandler(handler)
