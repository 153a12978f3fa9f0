"""Metrics survive kills without doubled or torn lines; progress says what a person wants to know."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest

from triqdef_jax import writer


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Replaces the clock of the progress line, in seconds; the real one would make the speed a matter of luck."""
    now = [100.0]
    monkeypatch.setattr(writer.time, "monotonic", lambda: now[0])
    return now


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_scalars_of_python_numpy_and_jax_become_one_flushed_line(tmp_path):
    with writer.MetricWriter(tmp_path) as metrics:
        metrics.write(3, {"loss": jnp.float32(0.5), "lr": np.float64(0.1), "n": 7})
        assert read(tmp_path) == [{"step": 3, "loss": 0.5, "lr": 0.1, "n": 7.0}]  # read before close: it was flushed


def test_numbers_that_are_not_finite_are_null_and_the_line_stays_json(tmp_path):
    with writer.MetricWriter(tmp_path) as metrics:
        metrics.write(1, {"loss": float("nan"), "norm": np.float32("inf")})
    assert read(tmp_path) == [{"step": 1, "loss": None, "norm": None}]


def test_resuming_drops_later_lines_and_a_torn_one_and_appends(tmp_path):
    with writer.MetricWriter(tmp_path) as metrics:
        for step in (0, 10, 20, 30):
            metrics.write(step, {"loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "lo')
    with writer.MetricWriter(tmp_path, restored_step=20) as metrics:
        metrics.write(30, {"loss": 2.0})
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [(0, 1.0), (10, 1.0), (20, 1.0), (30, 2.0)]


def test_a_fresh_run_starts_with_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    writer.MetricWriter(tmp_path).close()
    assert read(tmp_path) == []


def test_processes_other_than_the_lead_touch_nothing(tmp_path):
    with writer.MetricWriter(tmp_path / "run", is_lead=False) as metrics:
        metrics.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()
    stream = io.StringIO()
    with writer.Progress(10, 1, is_lead=False, stream=stream) as progress:
        progress.update(1)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("values", [{"loss": np.ones(2)}, {"loss": "high"}, {"step": 1.0}])
def test_what_is_no_scalar_is_refused_by_name_and_nothing_is_written(tmp_path, values):
    with writer.MetricWriter(tmp_path) as metrics:
        with pytest.raises(ValueError, match=f"metric '{next(iter(values))}' must be a single number"):
            metrics.write(1, values)
    assert read(tmp_path) == []


def test_tensorboard_gets_the_finite_scalars(tmp_path):
    pytest.importorskip("tensorboardX")
    with writer.MetricWriter(tmp_path) as metrics:
        metrics.write(1, {"my_loss": 0.5, "my_norm": float("nan")})
    (events,) = tmp_path.glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert b"my_loss" in content and b"my_norm" not in content


def test_a_log_has_one_line_per_update_with_speed_and_time_left(clock):
    stream = io.StringIO()
    progress = writer.Progress(100, 64, start_step=10, stream=stream)
    clock[0] += 5
    progress.update(20, {"loss": 0.51234}, "stage 2 (32, 8)")
    # 10 steps in 5 s are 2 steps/s: 128 images/s, and the 80 steps left take 40 s.
    assert stream.getvalue() == "step 20/100  stage 2 (32, 8)  loss 0.5123  128 images/s  40s left\n"


def test_the_slow_first_update_does_not_weigh_on_the_speed(clock):
    stream = io.StringIO()
    progress = writer.Progress(100, 1, stream=stream)
    clock[0] += 60  # compilation
    progress.update(10)
    clock[0] += 1
    progress.update(20)
    assert stream.getvalue().splitlines()[-1] == "step 20/100  10 images/s  8s left"


def test_a_terminal_line_is_rewritten_within_its_width_and_ended_on_close(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    with writer.Progress(100, 1, stream=stream) as progress:
        progress.update(1, label="a label that is far too long for the terminal")
        progress.update(2)
    first, second = stream.getvalue().split("\r\x1b[K")[1:]
    assert len(first) == 19 and "\n" not in first
    assert second == "step 2/100\n"


def test_times_are_written_for_people():
    assert [writer._duration(s) for s in (-1, 47.4, 185, 7620)] == ["0s", "47s", "3m 05s", "2h 07m"]
