"""Train a run: `python -m triqdef_jax.train --config=configs/digits.py [--workdir=DIR] [--config.a.b=value] [--profile_steps=a:b]`.

The same command again resumes where the run stopped; a finished run says so. Exit codes: 0 done, 1 failed, 2 bad input or disk, 42
preempted after saving (start the same command again). `--profile_steps` writes a trace of steps a to b to <workdir>/profile (docs/accelerators.md).
"""

import contextlib
import pathlib
import sys

from absl import flags

from triqdef_jax import entry, processes


def main(argv):
    del argv
    with processes.started(processes.from_flags()), contextlib.ExitStack() as held:
        return _train(*_open(held))


def _open(held):
    """Return (run, data, steps to trace) with the workdir claimed and locked, by the lead process, until `held` closes."""
    from triqdef_jax import config as config_lib
    from triqdef_jax import data, files, loop, profiling, runs, sharding

    config = _CONFIG.value
    with processes.together(), entry.user_errors():
        config_lib.validate(config)
        workdir = pathlib.Path(
            _WORKDIR.value or runs.default_workdir(*entry.config_source(_CONFIG), entry.config_overrides(_CONFIG))
        )
        loaded = data.load(config.data)
        run = loop.make_run(config, workdir, loaded.num_train)
        profile_steps = profiling.parse_steps(_PROFILE_STEPS.value, run.num_steps)
        if sharding.is_lead():
            runs.open_workdir(workdir, config)
            held.enter_context(files.exclusive(workdir / runs.LOCK_FILE))
    return run, loaded, profile_steps


def _train(run, loaded, profile_steps):
    """Get the patch pool, train, and say how it ended; returns the exit code."""
    from triqdef_jax import loop, sources

    pool = None
    try:
        if run.method.needs_pool:
            with entry.user_errors():
                pool = sources.train_pool(run.config, loaded).split()[0]
        step = loop.train(run, loaded, pool, profile_steps=profile_steps)
    except loop.NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return entry.EXIT_FAILED
    except loop.PreemptedError as error:
        processes.say(str(error), file=sys.stderr)
        return entry.EXIT_PREEMPTED
    if step < run.num_steps:
        processes.say(
            f"preempted: step {step} of {run.num_steps} is saved in {run.workdir}; the same command continues",
            file=sys.stderr,
        )
        return entry.EXIT_PREEMPTED
    processes.say(f"finished: {run.num_steps} steps in {run.workdir}")
    return 0


if __name__ == "__main__":
    _CONFIG, _WORKDIR = entry.define_config_flags(default="configs/digits.py")
    _PROFILE_STEPS = flags.DEFINE_string("profile_steps", "", "FIRST:LAST, counted from 1: steps to trace.")
    processes.define_flags()
    entry.run_program(main)
