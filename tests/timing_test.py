"""Tests of the stop-watch around programs."""

import time

import jax
import jax.numpy as jnp

from triqdef_jax import timing


def test_a_piece_compiles_once_counts_its_calls_and_takes_static_arguments():
    def power(base, exponent):
        return base**exponent

    piece = timing.Piece(jax.jit(power, static_argnums=1), static_argnums=(1,))
    assert [float(piece(jnp.float32(x), 3)) for x in (2, 3)] == [8.0, 27.0]
    report = piece.report(num_steps=1)
    assert report["calls"] == 2 and report["compile_cpu_seconds"] > 0 and report["gflops"] > 0
    assert report["argument_mib"] == report["output_mib"] == 4 / 2**20  # one float32


def test_a_cost_adds_up_time_on_the_clock_and_of_the_processor_and_passes_the_result_on():
    cost = timing.Cost()
    assert [cost.add(lambda x: time.sleep(0.02) or x, k) for k in (3, 4)] == [3, 4]
    assert 0.04 <= cost.wall and cost.cpu < cost.wall  # sleeping takes no processor time


def test_figures_are_summed_up_in_words():
    values = timing.spread([3.0, 1.0, 2.0, 10.0])
    assert values == {"median": 2.5, "min": 1.0, "max": 10.0}
    assert timing.spread_text(values) == "2.500 (1.000..10.000)"
    assert timing.number_text(None, 4, 1) == "   -" and timing.number_text(2.25, 6, 1) == "   2.2"
    assert timing.scaled(None, 2.0) is None and timing.scaled(3.0, 2.0) == 6.0


def test_the_machine_is_the_one_of_jax():
    here = timing.machine()
    assert here["backend"] == jax.devices()[0].platform and here["jax"] == jax.__version__
    assert here["cores"] >= 1 and here["num_devices"] == jax.device_count()
