"""Say what is missing before a config can train here: `python -m triqdef_jax.doctor [--config=FILE[:variant]] [--workdir=DIR]`.

With --distributed=on, as for training, it asks all processes, and process 0 prints for all. A line is ok, warn (trains, but) or fix (would not
train; says what to do). Exit code 0 where nothing has to be fixed, 1 otherwise, 2 for bad input. Nothing is left on disk.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import shutil
import socket
import uuid
from typing import Any

from absl import flags

from triqdef_jax import checks, entry, processes
from triqdef_jax.checks import FIX, OK, WARN, Finding

REQUIREMENTS = pathlib.Path(__file__).resolve().parent.parent / "requirements.txt"
OPTIONAL = {"tensorboardX": "metrics go to metrics.jsonl alone"}  # to what is missing without it


def main(argv):
    del argv
    installed = [Finding(OK, "python", f"{platform.python_version()} on {platform.machine()}"), packages()]
    if installed[-1].level == FIX:  # nothing else can be imported
        return report([installed])
    with processes.started(processes.from_flags()):
        from triqdef_jax import config as config_lib
        from triqdef_jax import runs, sharding

        config = _CONFIG.value
        with processes.together(), entry.user_errors():
            config_lib.validate(config)
            workdir = pathlib.Path(
                _WORKDIR.value or runs.default_workdir(*entry.config_source(_CONFIG), entry.config_overrides(_CONFIG))
            )
        findings = examine(config, workdir, min_free_gb=flags.FLAGS.min_free_gb)
        reports = [[Finding(*finding) for finding in told] for told in processes.gathered(installed + findings)]
        return report(reports, is_quiet=not sharding.is_lead())


def packages() -> Finding:
    """Return what is found of the required packages."""
    if REQUIREMENTS.is_file():
        return checks.packages(REQUIREMENTS.read_text().splitlines())
    return checks.packages(importlib.metadata.requires("triqdef_jax"))  # installed, and no clone beside it


def optional() -> Finding:
    """Return what is found of packages that training can do without."""
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    if missing:
        return Finding(WARN, "optional", f"{OPTIONAL[missing[0]]}: pip install {' '.join(missing)}")
    return Finding(OK, "optional", ", ".join(OPTIONAL))


def examine(config: Any, workdir: pathlib.Path, *, min_free_gb: float) -> list[Finding]:
    """Ask everything; all processes have to. config: validated."""
    import jax

    from triqdef_jax import sharding

    mesh = sharding.data_mesh()
    hosts = processes.gathered(socket.gethostname())
    here = hosts.count(hosts[jax.process_index()])
    present = [path for path in checks.ACCELERATORS if os.path.exists(path)]
    dataset, num_train = checks.dataset(config.data)
    batch_bytes = checks.batch_bytes(config, len(hosts))
    shared_bytes = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    return [
        optional(),
        Finding(OK, "processes", f"{len(hosts)} on {len(set(hosts))} machine{'s' * (len(set(hosts)) > 1)}"),
        checks.proxies(os.environ, len(hosts)),
        checks.devices(jax.devices(), jax.local_device_count(), present, os.environ),
        checks.memory(jax.local_devices()[0]),
        checks.collective(mesh),
        dataset,
        checks.run(config, num_train, mesh),
        checks.workers(config.data, batch_bytes, here, len(os.sched_getaffinity(0)), shared_bytes),
        checks.disk(workdir, min_free_gb=min_free_gb),
        shared_disk(workdir),
        checks.compile_cache(jax.config.jax_enable_compilation_cache and jax.config.jax_compilation_cache_dir),
    ]


def shared_disk(directory: pathlib.Path) -> Finding:
    """Say whether all processes see what the lead writes; all have to ask."""
    import jax

    from triqdef_jax import sharding

    if jax.process_count() == 1:
        return Finding(OK, "shared disk", "not needed by one process")
    mark = checks.nearest(directory) / f".doctor-{processes.gathered(uuid.uuid4().hex)[0]}"
    try:
        if sharding.is_lead():
            mark.touch()
        is_written = True
    except OSError:
        is_written = False
    if not processes.gathered(is_written)[0]:
        return Finding(WARN, "shared disk", "not checked, nothing can be written")
    blind = [rank for rank, is_seen in enumerate(processes.gathered(mark.exists())) if not is_seen]
    if sharding.is_lead():
        mark.unlink()
    if blind:
        where = f"process {blind[0]} does not see what process 0 writes in {mark.parent}"
        return Finding(FIX, "shared disk", f"{where}: put --workdir on a file system that all of them share")
    return Finding(OK, "shared disk", f"all processes see {mark.parent}")


def report(reports: list[list[Finding]], *, is_quiet: bool = False) -> int:
    """Print what the processes found, the lead's lines and of the others what differs; returns the exit code."""
    lines = [(0, finding) for finding in reports[0]]
    for rank, told in enumerate(reports[1:], start=1):
        lines += [(rank, finding) for finding in differing(told, reports[0])]
    if not is_quiet:
        for rank, finding in lines:
            print(f"{finding.level:<5}{finding.topic:<14}{f'process {rank}: ' if rank else ''}{finding.text}")
    num_fixes = sum(finding.level == FIX for _, finding in lines)
    if not is_quiet:
        print(f"not ready: {num_fixes} to fix" if num_fixes else "ready to train")
    return entry.EXIT_FAILED if num_fixes else 0


def differing(told: list[Finding], lead: list[Finding]) -> list[Finding]:
    """Return a process's findings that ask for something the lead's do not, and versions that are not the lead's."""
    differs = [finding for finding in told if finding.level != OK and finding not in lead]
    versions = {finding.text for finding in lead if finding.topic in ("python", "packages")}
    return differs + [
        Finding(FIX, finding.topic, f"{finding.text}; all processes need the same")
        for finding in told
        if finding.topic in ("python", "packages") and finding.level == OK and finding.text not in versions
    ]


if __name__ == "__main__":
    _CONFIG, _WORKDIR = entry.define_config_flags(default="configs/digits.py")
    processes.define_flags()
    flags.DEFINE_float("min_free_gb", 10.0, "Free space that the workdir's disk must have, in GB (1e9 bytes).")
    entry.run_program(main)
