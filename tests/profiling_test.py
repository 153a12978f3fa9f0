"""Traces: the steps that were asked for and no others, told by number; bad ranges are refused."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from triqdef_jax import loop, profiling, runs


def traced_steps(folder):
    """Numbers of the annotated steps in each trace below the folder."""
    found = []
    for path in sorted(folder.rglob("*.trace.json.gz")):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        found.append([int(event["args"]["step_num"]) for event in events if event.get("name") == profiling.EVENT])
    return found


def test_a_trace_names_its_steps_and_ends_with_the_last_of_them(tmp_path):
    trace, double = profiling.StepTrace(tmp_path, range(2, 4)), jax.jit(lambda x: 2 * x)
    value = jnp.float32(1)
    for number in range(1, 6):
        value = trace.step(number, double, value)
    assert float(value) == 32
    assert traced_steps(tmp_path) == [[2, 3]]
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_a_run_that_leaves_within_the_range_still_writes_its_trace(tmp_path):
    trace = profiling.StepTrace(tmp_path, range(2, 9))
    for number in (4, 5):  # resumed at 4, preempted after 5
        trace.step(number, jnp.sin, 1.0)
    trace.close()
    trace.close()
    assert traced_steps(tmp_path) == [[4, 5]]


def test_a_finished_run_writes_no_trace(tiny_run):
    workdir, loaded = tiny_run
    run = loop.make_run(runs.read_config(workdir), workdir, loaded.num_train)
    assert loop.train(run, loaded, None, is_quiet=True, profile_steps=range(2, 4)) == 8
    assert not (workdir / loop.PROFILE).exists()


@pytest.mark.parametrize("text", ["5", "0:3", "4:2", "2:11", "a:b", "1:2:3", "-1:3", ":"])
def test_other_ranges_than_those_of_the_run_are_refused_in_one_line(text):
    with pytest.raises(ValueError) as refused:
        profiling.parse_steps(text, 10)
    assert str(refused.value) == (
        f"--profile_steps must be FIRST:LAST with 1 <= FIRST <= LAST <= 10, the steps of the run, got {text!r}"
    )


def test_both_ends_belong_to_a_range_and_none_is_none():
    assert list(profiling.parse_steps("3:5", 5)) == [3, 4, 5]
    assert not profiling.parse_steps("", 5)
