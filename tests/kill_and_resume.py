"""The fault test by one command: runs are killed with SIGKILL again and again, and must end bit-identical to one that nothing disturbed.

    python tests/kill_and_resume.py --kills=20 --processes=1 [--seed=0]
    python tests/kill_and_resume.py --kills=20 --processes=2

A run is that of `training_example.py`: 32 steps, a checkpoint every three, at stages and at the end. Kills fall a random time after a random step
begins, after the temporary directory of a random save appears, and, once in every run, after the last save; with two processes one of them is
the victim, and the other is killed up to 0.3 s later. A kill counts as within a save if Orbax's temporary directory is there when
the victim is dead. Every start must resume from the newest step whose directory has its final name, and the state at the end must have
the SHA-256 of the undisturbed run's.
The seed chooses steps, kinds, victims and delays; what a delay meets depends on the machine. Prints a table; exit code 1 where anything
failed, or where of 20 or more kills fewer than two in five fell into a save.
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import training_example as example
from several_processes import free_port

from triqdef_jax import checkpoints, loop

MAX_KILLS_PER_RUN = 4  # before the one after the last save: a run has eleven saves
DELAY_S = {"step": 0.1, "saves": 0.02, "closed": 0.05}  # longest wait between its occasion and the kill


@dataclasses.dataclass
class Tally:
    """What was done and what failed."""

    runs: int = 0
    kills: int = 0
    in_save: int = 0
    after_last_save: int = 0
    by_rank: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    resumed_elsewhere: int = 0
    called_damaged: int = 0
    differing: int = 0

    @property
    def is_sound(self) -> bool:
        return not (self.resumed_elsewhere or self.called_damaged or self.differing)

    def lines(self) -> str:
        ranks = ", ".join(f"rank {rank}: {count}" for rank, count in sorted(self.by_rank.items()))
        rows = {
            "runs": self.runs,
            "kills": f"{self.kills} ({ranks})",
            "of them within a save": self.in_save,
            "of them after the last save": self.after_last_save,
            "starts that resumed elsewhere than at the newest whole step": self.resumed_elsewhere,
            "starts that called a checkpoint damaged": self.called_damaged,
            "runs whose final state differs": self.differing,
        }
        return "\n".join(f"{name:<60} {value}" for name, value in rows.items())


class Attempt:
    """One start of a run: its processes, and the lines that each has printed."""

    def __init__(self, workdir, environment, num_processes):
        flags = [[]]
        if num_processes > 1:
            port = free_port()
            flags = [[f"--rank={rank}", f"--port={port}"] for rank in range(num_processes)]
        pipes = dict(stdout=subprocess.PIPE, text=True, env=environment)
        self.logs = [open(workdir.with_name(f"{workdir.name}-{rank}.log"), "a+") for rank in range(num_processes)]
        self.children = [
            subprocess.Popen(example.command(workdir, *own), stderr=log, **pipes)
            for own, log in zip(flags, self.logs, strict=True)
        ]
        self.lines = [[] for _ in self.children]

    def read_until(self, rank, is_awaited):
        """Read lines of a process until one is awaited; returns it, or None where the process ends first."""
        for line in self.children[rank].stdout:
            self.lines[rank].append(line.strip())
            if is_awaited(self.lines[rank][-1]):
                return self.lines[rank][-1]
        return None

    def end(self):
        """Wait for all processes; returns their exit codes and what they wrote to stderr."""
        readers = [
            threading.Thread(target=self.read_until, args=(r, lambda _: False)) for r in range(len(self.children))
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        codes = [child.wait() for child in self.children]
        for child in self.children:
            child.stdout.close()
        said = []
        for log in self.logs:
            log.seek(0)
            said.append(log.read())
            log.truncate(0)
            log.close()
        return codes, said

    @property
    def resumed_from(self):
        """The steps from which the processes said that they resume."""
        told = [line.removeprefix("resumes from ") for lines in self.lines for line in lines if "resumes" in line]
        return {int(step) for step in told}


def newest_step(workdir):
    """Return the newest step under its final name, which a directory gets when it is whole; None where there is none."""
    folder = workdir / loop.CHECKPOINTS
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    return max(steps, default=None)


def _leftovers(workdir):
    """Return name and inode of the directories of unfinished saves."""
    folder = workdir / loop.CHECKPOINTS
    found = os.scandir(folder) if folder.is_dir() else ()
    return {(entry.name, entry.inode()) for entry in found if "orbax-checkpoint-tmp" in entry.name}


def _await_save(workdir, before):
    """Return as soon as the directory of an unfinished save appears, or after a second, for it may be gone already."""
    until = time.monotonic() + 1.0
    while _leftovers(workdir) <= before and time.monotonic() < until:
        time.sleep(0.001)


def undisturbed_digest(workdir, environment, num_processes):
    """Return the SHA-256 of the state at the end of a run that nothing disturbs."""
    codes, said = Attempt(workdir, environment, num_processes).end()
    if any(codes):
        raise RuntimeError(f"the undisturbed run failed, exit codes {codes}: {said}")
    return state_digest(workdir)


def state_digest(workdir):
    with checkpoints.Checkpointer(workdir / loop.CHECKPOINTS) as checkpointer:
        return checkpoints.tree_digest(checkpointer.restore_raw()[0])


def fault_test(folder, environment, num_processes, num_kills, seed, expected):
    """Kill and resume runs in `folder` until there were so many kills; returns the `Tally`. `expected`: digest of the undisturbed run."""
    tally, rng = Tally(), np.random.default_rng(seed)
    while tally.kills < num_kills:
        workdir = folder / f"run{tally.runs}"
        num_before = min(int(rng.integers(2, MAX_KILLS_PER_RUN + 1)), max(0, num_kills - tally.kills - 1))
        for left in range(num_before, 0, -1):
            _start_and_kill(
                tally,
                rng,
                workdir,
                environment,
                num_processes,
                str(rng.choice(["step", "saves", "saves", "saves"])),
                left,
            )
        _start_and_kill(tally, rng, workdir, environment, num_processes, "closed", 0)
        newest, attempt = newest_step(workdir), Attempt(workdir, environment, num_processes)
        codes, said = attempt.end()
        _check_start(tally, newest, attempt, said)
        tally.runs += 1
        tally.differing += any(codes) or state_digest(workdir) != expected
        print(f"run {tally.runs}: {tally.kills} kills so far, {tally.in_save} within a save", flush=True)
    return tally


def _start_and_kill(tally, rng, workdir, environment, num_processes, kind, num_left):
    """Start the processes, kill one after a line of the given kind and the others soon after."""
    newest, left_before = newest_step(workdir), _leftovers(workdir)
    victim, start = int(rng.integers(num_processes)), newest or 0
    at = start + int(rng.integers(1, 2 + (example.NUM_STEPS - start) // (num_left + 1)))
    delay_s, survivors_s = rng.uniform(0, DELAY_S[kind]), rng.uniform(0, 0.3)
    attempt = Attempt(workdir, environment, num_processes)
    is_in_save = False
    is_awaited = lambda line: line.startswith(kind) and (kind == "closed" or int(line.split()[1]) >= at)
    if attempt.read_until(victim, is_awaited):
        if kind == "saves":
            _await_save(workdir, left_before)
        time.sleep(delay_s)
        attempt.children[victim].kill()
        attempt.children[victim].wait()
        is_in_save = bool(_leftovers(workdir) - left_before)
        if num_processes > 1:
            time.sleep(survivors_s)
    for child in attempt.children:
        child.kill()
    codes, said = attempt.end()
    _check_start(tally, newest, attempt, said)
    if codes[victim] == -9:
        tally.kills += 1
        tally.by_rank[victim] += 1
        tally.after_last_save += kind == "closed"
        tally.in_save += is_in_save


def _check_start(tally, newest, attempt, said):
    """Compare where the processes said that they resume with the newest whole step before they were started."""
    if attempt.resumed_from != ({newest} - {None}):
        tally.resumed_elsewhere += 1
        print(
            f"step {newest} was the newest whole one, resumed from {attempt.resumed_from}: {attempt.lines}", flush=True
        )
    tally.called_damaged += any("damaged" in text for text in said)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="kills to reach")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2), help="processes of a run")
    parser.add_argument("--seed", type=int, default=0, help="of steps, kinds, victims and delays")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as root:
        folder = pathlib.Path(root)
        environment = example.environment(folder / "compiled")
        expected = undisturbed_digest(folder / "undisturbed", environment, asked.processes)
        tally = fault_test(folder, environment, asked.processes, asked.kills, asked.seed, expected)
    print(tally.lines())
    is_hit = asked.kills < 20 or 5 * tally.in_save >= 2 * tally.kills
    return 0 if tally.is_sound and is_hit else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
