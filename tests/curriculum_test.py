"""Stages tile the run, bit-widths join in descending order, and starts that do not fit are refused."""

import itertools

import pytest

from triqdef_jax import curriculum
from triqdef_jax.curriculum import Stage, make_stages

BITS, STARTS = (32, 8, 5, 4, 2), (0.3, 0.45, 0.6)


def test_the_default_run_has_the_four_stages_of_the_hand():
    assert make_stages(BITS, 100, STARTS) == (
        Stage(0, 30, (32, 8), (32, 8)),
        Stage(30, 45, (32, 8, 5), (5,)),
        Stage(45, 60, (32, 8, 5, 4), (4,)),
        Stage(60, 100, (32, 8, 5, 4, 2), (2,)),
    )


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 7, 100, 12345])
def test_stages_cover_every_step_once_and_every_bit_width_joins_once(num_steps):
    stages = make_stages(BITS, num_steps, STARTS)
    steps = [step for stage in stages for step in range(stage.start, stage.stop)]
    assert steps == list(range(num_steps)) and all(stage.start < stage.stop for stage in stages)
    assert sorted(b for stage in stages for b in stage.new_bits) == sorted(BITS)
    for stage, later in itertools.pairwise(stages):
        assert set(later.bits) == {*stage.bits, *later.new_bits}
    assert stages[-1].bits == BITS


def test_active_bits_keep_the_order_of_the_config_and_new_bits_are_widest_first():
    stages = make_stages((2, 32, 5, 8), 10, (0.2, 0.4))
    assert [stage.bits for stage in stages] == [(32, 8), (32, 5, 8), (2, 32, 5, 8)]
    assert [stage.new_bits for stage in stages] == [(32, 8), (5,), (2,)]
    assert make_stages((2, 32, 5, 8), 1, (0.2, 0.4))[0].new_bits == (32, 8, 5, 2)


@pytest.mark.parametrize(
    "bits, joining", [((32, 8, 5, 4, 2), (5, 4, 2)), ((4, 2), (2,)), ((2, 3), (2,)), ((6,), ()), ((8, 32), ())]
)
def test_bits_below_eight_join_later_except_the_widest_of_all(bits, joining):
    assert curriculum.joining_bits(bits) == joining


def test_without_the_curriculum_all_bits_train_from_the_first_step_whatever_the_starts():
    assert make_stages(BITS, 10, STARTS, enabled=False) == (Stage(0, 10, BITS, BITS),)


@pytest.mark.parametrize("starts", [(), (0.3, 0.45), (0.1, 0.2, 0.3, 0.4)])
def test_a_wrong_number_of_starts_is_refused_with_the_bits_that_need_one(starts):
    with pytest.raises(
        ValueError, match=r"one fraction for each of the bit-widths \(5, 4, 2\).*set bact.starts to 3 rising"
    ):
        make_stages(BITS, 100, starts)


@pytest.mark.parametrize(
    "starts", [(0.0, 0.4, 0.6), (0.3, 0.4, 1.0), (0.3, 0.3, 0.6), (0.6, 0.4, 0.3), (0.3, float("nan"), 0.6)]
)
def test_starts_that_do_not_rise_between_0_and_1_are_refused(starts):
    with pytest.raises(ValueError, match=r"bact\.starts must be rising fractions between 0 and 1, got"):
        make_stages(BITS, 100, starts)


def test_the_penalty_ramp_rises_linearly_to_one_and_stays():
    assert [curriculum.penalty_ramp(step, warmup_steps=4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [curriculum.penalty_ramp(step, warmup_steps=2, start=3) for step in (0, 2, 3, 4, 9)] == [
        0.0,
        0.0,
        0.5,
        1.0,
        1.0,
    ]
    assert curriculum.penalty_ramp(0, warmup_steps=0) == 1.0
