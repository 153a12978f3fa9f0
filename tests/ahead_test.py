"""Compilation ahead: the next stage's program is there when it is wanted, computes the same, and nobody waits for a thread to leave."""

import logging
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_example as example

from triqdef_jax import ahead, loop, train_step


@pytest.fixture
def compiler():
    """One whose thread has ended when the test has."""
    compiler = ahead.Compiler()
    yield compiler
    compiler.close()
    for thread in threading.enumerate():
        if thread.name.startswith("compile_ahead"):
            thread.join()


@pytest.fixture
def traced_in():
    """(function, list of the threads that traced it): `scale` powers of two times the numbers, their product with all of `factors`."""
    threads = []

    def function(numbers, scale, factors):
        threads.append(threading.current_thread().name)
        if scale < 0:
            raise RuntimeError("no negative scale\nhere")
        return 2**scale * numbers * sum(factors)

    return function, threads


def test_what_was_prepared_is_compiled_in_the_thread_and_runs_in_place_of_the_jitted_function(compiler, traced_in):
    function, threads = traced_in
    program = compiler.jit(function, static_argnums=(1,), donate_argnums=0)
    assert float(program(jnp.float32(3), 1, [np.float32(1)])) == 6
    compiler.prepare(2, [np.float32(0)] * 2)
    results = [float(program(jnp.float32(3), 2, [np.float32(1)] * 2)) for _ in range(2)]
    assert results == [24, 24]
    assert len(threads) == 2 and threads[1].startswith("compile_ahead")
    assert float(program(jnp.float32(3), 3, [np.float32(1)])) == 24  # not prepared: in place
    assert threads[2] == threading.current_thread().name


def test_a_failure_in_the_thread_is_one_line_and_shows_in_place(compiler, traced_in, caplog):
    function, _ = traced_in
    program = compiler.jit(function, static_argnums=(1,))
    program(jnp.float32(3), 1, [np.float32(1)])
    compiler.prepare(-1, [np.float32(1)])
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match="no negative scale"):
        program(jnp.float32(3), -1, [np.float32(1)])
    said = "the next stage could not be compiled ahead (RuntimeError: no negative scale here); compiling in place"
    assert caplog.messages == [said]


def test_shapes_that_nobody_foresaw_are_compiled_in_place(compiler, traced_in, caplog):
    function, _ = traced_in
    program = compiler.jit(function, static_argnums=(1,), donate_argnums=0)
    program(jnp.float32(3), 1, [np.float32(1)])
    compiler.prepare(2, [np.float32(1)])
    with caplog.at_level(logging.WARNING):
        results = [program(jnp.ones(2), 2, [np.float32(1)]).tolist() for _ in range(2)]
    assert results == [[4, 4]] * 2 and len(caplog.messages) == 1


def test_closing_waits_for_nothing_and_begins_nothing_more(compiler):
    begun, may_end, traced = threading.Event(), threading.Event(), []

    def function(number, scale):
        traced.append(scale)
        if scale > 1:
            begun.set()
            may_end.wait()
        return scale * number

    program = compiler.jit(function, static_argnums=(1,))
    program(jnp.float32(3), 1)
    compiler.prepare(2)
    compiler.prepare(3)
    begun.wait()
    compiler.close()  # would never return if it waited
    may_end.set()
    assert float(program(jnp.float32(3), 2)) == 6
    assert traced == [1, 2]


def test_functions_without_a_static_argument_are_jitted_and_nothing_else(compiler):
    program = compiler.jit(lambda x: x + 1)
    compiler.prepare((8, 2))
    assert int(program(1)) == 2
    assert not [t for t in threading.enumerate() if t.name.startswith("compile_ahead")]


def test_a_run_compiles_its_later_stages_in_the_thread_and_ends_as_without_it(tmp_path, monkeypatch):
    changes = {
        "loss.method": "qat",
        "quant.bits": (32, 4),
        "bact.starts": (0.5,),
        "train.epochs": 2,
        "train.plan": "fused",
    }
    states, threads, run_step, loaded = [], [], train_step.run_step, example.make_data()
    for is_ahead in (False, True):
        config = example.make_config(**changes, **{"train.compile_ahead": is_ahead, "train.keep_best": False})
        run = loop.make_run(config, tmp_path / str(is_ahead), loaded.num_train)

        def traced(settings, pieces, state, inputs, bits, *rest):
            threads.append((bits, threading.current_thread().name.partition("_0")[0]))
            return run_step(settings, pieces, state, inputs, bits, *rest)

        monkeypatch.setattr(train_step, "run_step", traced)
        profiled = range(4, 6) if is_ahead else range(0)  # over the end of the stage
        assert loop.train(run, loaded, None, is_quiet=True, profile_steps=profiled) == 8
        assert len(list((run.workdir / loop.PROFILE).rglob("*.xplane.pb"))) == is_ahead
        with loop.Checkpointer(run.workdir / loop.CHECKPOINTS) as checkpointer:
            states.append(checkpointer.restore_raw()[0])
    here = threading.current_thread().name
    assert threads == [((32,), here), ((32, 4), here), ((32,), here), ((32, 4), "compile_ahead")]
    jax.tree.map(np.testing.assert_array_equal, *states)
