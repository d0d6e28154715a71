"""The arithmetic that every stage shares."""

import math
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.schedule import cosine_to_zero, learning_rate, muon_momentum, plan_batches, plan_horizon

trapezoid = partial(learning_rate, schedule="trapezoid")
ratios = st.floats(0, 1)


@given(num_steps=st.integers(1, 5000), at=st.floats(0, 1), warmup=ratios, warmdown=ratios, final=ratios)
def test_learning_rate_never_leaves_zero_to_one(num_steps, at, warmup, warmdown, final):
    """nanochat's multiplier goes negative when the loop runs past its plan, and ruins the weights."""
    step = min(num_steps - 1, int(at * num_steps))
    assert 0 <= trapezoid(step, num_steps, warmup, warmdown, final) <= 1
    assert trapezoid(num_steps + 7, num_steps, warmup, warmdown, final) >= 0


def test_trapezoid_rises_stays_and_falls():
    curve = [trapezoid(step, 100, 0.1, 0.4, 0.2) for step in range(100)]
    assert curve[0] == pytest.approx(0.1)
    assert curve[9] == curve[59] == 1.0
    assert curve[80] == pytest.approx(0.5 + 0.5 * 0.2)
    assert curve[99] == pytest.approx(1 / 40 + 39 / 40 * 0.2)
    assert curve == sorted(curve[:60]) + sorted(curve[60:], reverse=True)


def low(left: float) -> float:
    """What is left of the fall, between 0.1 and 1."""
    return 0.1 + 0.9 * left


@pytest.mark.parametrize(
    ("schedule", "values"),  # at the start, the end of the warm-up, the middle, four fifths, the last step
    [
        ("trapezoid", [0.1, 1.0, 1.0, low(2 / 3), low(1 / 30)]),
        ("wsd", [0.1, 1.0, 1.0, low(1 - (1 / 3) ** 0.5), low(1 - (29 / 30) ** 0.5)]),
        ("linear", [0.1, 1.0, low(5 / 9), low(2 / 9), low(1 / 90)]),
        ("cosine", [0.1, 1.0, *(low(0.5 + 0.5 * math.cos(math.pi * share)) for share in (4 / 9, 7 / 9, 89 / 90))]),
        ("constant", [0.1, 1.0, 1.0, 1.0, 1.0]),
        ("range", [math.exp(5 * step / 99 - 2.5) for step in (0, 9, 50, 80, 99)]),
    ],
)
def test_values_of_every_schedule(schedule, values):
    at = [learning_rate(step, 100, 0.1, 0.3, 0.1, schedule) for step in (0, 9, 50, 80, 99)]
    assert at == pytest.approx(values)


@given(num_steps=st.integers(1, 3000), at=st.floats(0, 1), warmup=ratios, warmdown=ratios, final=ratios)
@pytest.mark.parametrize("schedule", ["wsd", "linear", "cosine", "constant"])
def test_no_schedule_leaves_zero_to_one_or_begins_at_zero(schedule, num_steps, at, warmup, warmdown, final):
    step = min(num_steps - 1, int(at * num_steps))
    assert 0 <= learning_rate(step, num_steps, warmup, warmdown, final, schedule) <= 1 + 1e-12
    assert learning_rate(0, num_steps, warmup, warmdown, final, schedule) > 0


def test_a_short_run_leaves_warmup():
    """nanochat with 20 steps never gets past half the learning rate."""
    assert max(trapezoid(step, 20, 0.1, 0.4, 0.0) for step in range(20)) == 1.0
    assert trapezoid(0, 1, 0.1, 0.4, 0.0) == 1.0


@given(num_steps=st.integers(1, 3000))
def test_momentum_has_no_jump(num_steps):
    """nanochat's jumps from 0.970 to 0.922 at step 400 of a run of 500."""
    values = [muon_momentum(step, num_steps) for step in range(num_steps)]
    assert all(0.85 <= value <= 0.95 for value in values)
    assert values == sorted(values)
    assert all(b - a <= 0.1 / max(1, min(300, num_steps / 5)) + 1e-9 for a, b in zip(values, values[1:], strict=False))


def test_cosine_ends_at_zero():
    assert cosine_to_zero(0, 10) == 1.0
    assert cosine_to_zero(10, 10) == pytest.approx(0.0)


def test_batches_of_the_launchers_on_eight_and_on_six_gpus():
    assert str(plan_batches(524288, 32, 2048, 8)) == "524,288 tokens = 1 micro-batch x 32 rows x 2048 tokens x 8 ranks"
    six = plan_batches(524288, 8, 2048, 6)  # nanochat asserts here
    assert str(six) == "491,520 tokens = 5 micro-batches x 8 rows x 2048 tokens x 6 ranks"
    assert (six.grad_accum_steps, six.tokens) == (5, 491520)
    assert plan_batches(393216, 6, 2048, 6).tokens == 5 * 6 * 2048 * 6  # launch_6x_amd_xtx.sh


@given(total=st.integers(1, 10**6), rows=st.integers(1, 64), length=st.integers(1, 512), ranks=st.integers(1, 9))
def test_batch_is_whole_and_within_half_a_micro_batch(total, rows, length, ranks):
    plan = plan_batches(total, rows, length, ranks)
    assert plan.grad_accum_steps >= 1 and plan.tokens == plan.rows * length
    assert abs(plan.tokens - total) <= max(rows * length * ranks / 2, rows * length * ranks - total)


def test_horizons():
    plan = partial(plan_horizon, 1000, 600, (5000, "parameters"))
    assert plan(num_iterations=7)[0] == 7
    assert plan(target_flops=6e6)[0] == 10
    assert plan(target_param_data_ratio=20)[0] == 100
    assert plan() == (100, "20 tokens x 5,000 parameters / 1,000 tokens per step")
