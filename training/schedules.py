"""Learning-rate schedules: pure functions from (step, progress) to a factor of the peak rate.

``step`` counts the optimizer steps done, ``progress`` is the share of the run that is done, by
steps or by minutes, in [0, 1]. Warm-up is counted in steps and the decay in progress, so that a run
that is limited by minutes warms up as any other and still decays to its end. In a run with phases,
both begin anew in each phase, and a share of the run is a share of the phase.
"""

import math


def cosine(step: int, progress: float, *, warmup_steps: int, final: float) -> float:
    """Half a cosine from 1 to ``final`` over the run, times a linear warm-up.

    Source:
        SGDR, Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, without restarts.
    """
    _check_final(final)
    return _warmup(step, warmup_steps) * _blend(0.5 + 0.5 * math.cos(math.pi * progress), final)


def warmup_stable_decay(
    step: int, progress: float, *, warmup_steps: int, decay: float, final: float
) -> float:
    """Constant after a linear warm-up, then linear to ``final`` over the last ``decay`` of the run.

    Source:
        MiniCPM, Hu et al. 2024, arXiv:2404.06395, section 4; linear decay: Hägele et al. 2024,
        arXiv:2405.18392.
    """
    _check_final(final)
    if not 0 < decay <= 1:
        raise ValueError(
            f"the decay is a share of the run, above 0 and at most 1, got decay={decay}; "
            f"change `schedule.decay`."
        )
    return _warmup(step, warmup_steps) * _blend(min(1.0, (1 - progress) / decay), final)


def constant(step: int, progress: float, *, warmup_steps: int, warmup_share: float) -> float:
    """Constant after a linear warm-up over ``warmup_share`` of the run, at most ``warmup_steps``.

    Source:
        Longformer, Beltagy et al. 2020, arXiv:2004.05150, table 12: 10 % of each phase, at most
        10,000 steps.
    """
    if not 0 < warmup_share <= 1:
        raise ValueError(
            f"the warm-up is a share of the run, above 0 and at most 1, got "
            f"warmup_share={warmup_share}; change `schedule.warmup_share`."
        )
    return max(_warmup(step, warmup_steps), min(1.0, progress / warmup_share))


def _warmup(step: int, warmup_steps: int) -> float:
    """Linear to 1 at step ``warmup_steps - 1``; the first step already learns."""
    if warmup_steps < 0:
        raise ValueError(
            f"warm-up steps cannot be negative, got {warmup_steps}; change `schedule.warmup_steps`."
        )
    return min(1.0, (step + 1) / max(1, warmup_steps))


def _blend(remaining: float, final: float) -> float:
    return final + (1 - final) * remaining


def _check_final(final: float) -> None:
    if not 0 <= final <= 1:
        raise ValueError(
            f"the final learning rate is a share of the peak, from 0 to 1, got final={final}; "
            f"change `schedule.final`."
        )
