"""Train a run: `python -m triqdef_jax.train --config=configs/digits.py [--workdir=DIR] [--config.a.b=value] [--profile_steps=a:b]`.

The same command again resumes where the run stopped; a finished run says so. Exit codes: 0 done, 1 failed, 2 bad input, 42 preempted after
saving (start the same command again). `--profile_steps` writes a trace of steps a to b to <workdir>/profile (docs/accelerators.md).
"""

import contextlib
import pathlib
import sys

from absl import flags

from triqdef_jax import entry


def main(argv):
    del argv
    from triqdef_jax import config as config_lib
    from triqdef_jax import data, files, loop, profiling, runs

    config = _CONFIG.value
    with contextlib.ExitStack() as held:
        with entry.user_errors():
            config_lib.validate(config)
            workdir = pathlib.Path(
                _WORKDIR.value or runs.default_workdir(*entry.config_source(_CONFIG), entry.config_overrides(_CONFIG))
            )
            loaded = data.load(config.data)
            run = loop.make_run(config, workdir, loaded.num_train)
            profile_steps = profiling.parse_steps(_PROFILE_STEPS.value, run.num_steps)
            runs.open_workdir(workdir, config)
            held.enter_context(files.exclusive(workdir / runs.LOCK_FILE))
        return _train(run, loaded, profile_steps)


def _train(run, loaded, profile_steps):
    """Get the patch pool, train, and say how it ended; returns the exit code."""
    from triqdef_jax import loop, sources
    from triqdef_jax.checkpoints import CheckpointError

    pool = None
    try:
        if run.method.needs_pool:
            with entry.user_errors():
                pool = sources.train_pool(run.config, loaded).split()[0]
        step = loop.train(run, loaded, pool, profile_steps=profile_steps)
    except (loop.NonFiniteLossError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return entry.EXIT_FAILED
    except loop.PreemptedError as error:
        print(error, file=sys.stderr)
        return entry.EXIT_PREEMPTED
    if step < run.num_steps:
        print(
            f"preempted: step {step} of {run.num_steps} is saved in {run.workdir}; the same command continues",
            file=sys.stderr,
        )
        return entry.EXIT_PREEMPTED
    print(f"finished: {run.num_steps} steps in {run.workdir}")
    return 0


if __name__ == "__main__":
    _CONFIG, _WORKDIR = entry.define_config_flags(default="configs/digits.py")
    _PROFILE_STEPS = flags.DEFINE_string("profile_steps", "", "FIRST:LAST, counted from 1: steps to trace.")
    entry.run_program(main)
