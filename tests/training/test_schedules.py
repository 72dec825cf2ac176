"""Learning-rate schedules."""

from functools import partial

import pytest

from training.schedules import constant, cosine, warmup_stable_decay

SCHEDULES = [
    partial(cosine, warmup_steps=10, final=0.1),
    partial(warmup_stable_decay, warmup_steps=10, decay=0.2, final=0.1),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_the_first_step_already_learns(schedule):
    assert [schedule(step, 0.0) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1, 1])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_never_rises_after_warm_up_and_ends_at_its_final_share(schedule):
    rates = [schedule(100, n / 100) for n in range(101)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.1)


def test_cosine_is_halfway_down_in_the_middle():
    assert cosine(100, 0.5, warmup_steps=0, final=0.2) == pytest.approx(0.6)


def test_warmup_stable_decay_is_constant_until_the_decay_and_then_linear():
    at = partial(warmup_stable_decay, 100, warmup_steps=0, decay=0.2, final=0.0)
    assert [at(0.3), at(0.8), at(0.9)] == pytest.approx([1.0, 1.0, 0.5])


def test_constant_warms_up_over_its_share_of_the_run_or_its_steps_whichever_is_shorter():
    at = partial(constant, warmup_steps=10, warmup_share=0.1)
    in_a_run = {steps: [at(n, n / steps) for n in range(steps)] for steps in (1000, 50)}
    assert in_a_run[1000][:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert in_a_run[50][:6] == pytest.approx([0.1, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert set(in_a_run[1000][9:] + in_a_run[50][5:]) == {1.0}


@pytest.mark.parametrize("share", [0, 1.2])
def test_a_warm_up_that_is_no_share_of_the_run_is_refused(share):
    with pytest.raises(ValueError, match=f"warmup_share={share}.*schedule.warmup_share"):
        constant(0, 0.0, warmup_steps=1, warmup_share=share)


@pytest.mark.parametrize("final", [-0.1, 1.5])
def test_a_final_rate_that_is_no_share_of_the_peak_is_refused(final):
    with pytest.raises(ValueError, match=f"final={final}.*schedule.final"):
        cosine(0, 0.0, warmup_steps=1, final=final)


@pytest.mark.parametrize("decay", [0, 1.2])
def test_a_decay_that_is_no_share_of_the_run_is_refused(decay):
    with pytest.raises(ValueError, match=f"decay={decay}.*schedule.decay"):
        warmup_stable_decay(0, 0.0, warmup_steps=1, decay=decay, final=0.0)
