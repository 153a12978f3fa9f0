"""What training needs from a machine, each as a function from what is there to a `Finding`; `doctor` asks them all.

Sizes are in GB (1e9 bytes). jax is imported where it is used, so that `packages` can say that it is missing.
"""

import importlib.metadata
import math
import operator
import os
import pathlib
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

OK, WARN, FIX = LEVELS = ("ok", "warn", "fix")  # fine; trains, but; would not train
GB = 1e9
SUMMED_FLOATS = 2**20  # per device in `collective`; a step of ResNet-50 sums 25 times as many
MIN_MEMORY_GB = 1.0
ACCELERATORS = {
    "/dev/nvidia0": "cuda13",
    "/dev/accel0": "tpu",
    "/dev/vfio/0": "tpu",
}  # to the extra of jax that drives it
_COMPARE = {">=": operator.ge, "<": operator.lt, "==": operator.eq}


class Finding(NamedTuple):
    """One line of the report: level (of `LEVELS`), what was looked at, and what was found; for 'fix' also what to do."""

    level: str
    topic: str
    text: str


def packages(requirements: Iterable[str], version_of: Callable[[str], str] = importlib.metadata.version) -> Finding:
    """Say which required packages are missing, or of a version outside the range that is tested.

    Args:
        requirements: lines like 'jax>=0.10.2,<0.13'; comments and empty lines are passed over.
        version_of: a package's version; raises `importlib.metadata.PackageNotFoundError`.
    """
    found, missing, untested = {}, [], []
    for requirement in filter(None, (line.partition("#")[0].strip() for line in requirements)):
        name, bounds = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()
        try:
            found[name] = version_of(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement)
            continue
        comparisons = re.findall(r"(>=|<|==)([^,]+)", bounds)
        if not all(_COMPARE[sign](_numbers(found[name]), _numbers(bound)) for sign, bound in comparisons):
            untested.append(f"{name} {found[name]} (tested: {bounds})")
    if missing:
        return Finding(FIX, "packages", f"missing: pip install {' '.join(repr(name) for name in missing)}")
    if untested:
        return Finding(WARN, "packages", f"untested: {', '.join(untested)}; pip install -r requirements.txt")
    named = ", ".join(f"{name} {found[name]}" for name in ("jax", "flax", "orbax-checkpoint", "grain") if name in found)
    return Finding(OK, "packages", f"all {len(found)} within requirements.txt: {named}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def devices(found: Sequence[Any], num_here: int, present: Sequence[str], environ: Mapping[str, str]) -> Finding:
    """Say what JAX computes on; warn where it leaves an accelerator alone that nobody told it to.

    Args:
        found: devices of all processes, `jax.devices()`. num_here: how many are this one's. present: paths of `ACCELERATORS` on this
            machine. environ: environment.
    """
    kinds = sorted({device.device_kind for device in found})
    text = f"{len(found)} x {', '.join(kinds)} ({found[0].platform}), {num_here} in a process"
    if found[0].platform == "cpu" and present and not environ.get("JAX_PLATFORMS"):
        wanted = f"jax[{ACCELERATORS[present[0]]}]=={importlib.metadata.version('jax')}"
        return Finding(WARN, "devices", f"{text}, but {present[0]} is here: pip install '{wanted}'")
    return Finding(OK, "devices", text)


def memory(device: Any) -> Finding:
    """Say how much memory a device has, or the host where its devices do not count theirs."""
    stats = device.memory_stats()
    if stats:
        total, free = stats["bytes_limit"], stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    else:
        kilobytes = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(kilobytes[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    text = f"{total / GB:.1f} GB {'per device' if stats else 'of the host'}, {free / GB:.1f} GB free"
    return Finding(OK if free / GB >= MIN_MEMORY_GB else WARN, "memory", text)


def collective(mesh: Any, *, repeats: int = 10) -> Finding:
    """Sum an array over all devices of all processes, check the sum, and say what it takes (median on the clock)."""
    import jax

    from triqdef_jax import sharding

    place = sharding.batch_sharding(mesh)
    rows = jax.make_array_from_callback((mesh.size, SUMMED_FLOATS), place, _numbered_rows)
    add = jax.jit(lambda values: values.sum(axis=0), out_shardings=sharding.replicated(mesh))
    expected = mesh.size * (mesh.size + 1) / 2
    total = np.asarray(add(rows).addressable_data(0))
    size = f"{SUMMED_FLOATS * 4 / 2**20:.0f} MiB over {mesh.size} device{'s' * (mesh.size > 1)}"
    if not np.all(total == expected):
        wrong = total[total != expected][0]
        return Finding(
            FIX, "collective", f"the sum of {size} is wrong: {wrong:g} for {expected:g}; do not trust this machine"
        )
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(add(rows))
        seconds.append(time.perf_counter() - start)
    return Finding(
        OK, "collective", f"{size} summed in {1e3 * statistics.median(seconds):.2f} ms (median of {repeats})"
    )


def _numbered_rows(index):
    """Return row i full of i + 1; small whole numbers, whose sums are exact in any order."""
    return np.repeat(np.float32(np.arange(index[0].start or 0, index[0].stop or 1) + 1)[:, None], SUMMED_FLOATS, axis=1)


def dataset(settings: Any) -> tuple[Finding, int]:
    """Return what is found of the data set of a config's `data` part, and its number of training images, 0 where it fails."""
    from triqdef_jax import data

    try:
        loaded = data.load(settings)
    except (ValueError, OSError) as error:
        return Finding(FIX, "data", _line(error)), 0
    where = "embedded" if settings.name == "digits" else f"in {data.resolve_dir(settings.dir)}"
    return Finding(OK, "data", f"{settings.name} {where}: {loaded.num_train} training images"), loaded.num_train


def run(config: Any, num_train: int, mesh: Any) -> Finding:
    """Say whether the config fits the data and the devices. num_train: 0 where the data are missing."""
    from triqdef_jax import loop

    if not num_train:
        return Finding(WARN, "run", "not checked without data")
    try:
        made = loop.make_run(config, "", num_train)
    except ValueError as error:
        return Finding(FIX, "run", _line(error))
    rows = config.train.batch_size // mesh.size
    return Finding(OK, "run", f"{made.num_steps} steps of {config.train.batch_size} images, {rows} per device")


def disk(directory: pathlib.Path, *, min_free_gb: float) -> Finding:
    """Write and remove a file where a directory lies, or would lie, and compare the free space with what is asked."""
    there = nearest(directory)
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"doctor")
            file.flush()
            os.fsync(file.fileno())
        free_gb = shutil.disk_usage(there).free / GB
    except OSError as error:
        return Finding(FIX, "disk", f"cannot write to {there} ({error.strerror}); name another --workdir")
    if free_gb < min_free_gb:
        text = f"{free_gb:.1f} GB free for {directory}, below --min_free_gb={min_free_gb:g}; make room or name another --workdir"
        return Finding(FIX, "disk", text)
    return Finding(OK, "disk", f"{free_gb:.1f} GB free for {directory}")


def nearest(path: pathlib.Path) -> pathlib.Path:
    """Return the path itself, or the closest one above it that exists."""
    path = pathlib.Path(path).absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def workers(settings: Any, batch_bytes: int, processes_here: int, cores: int, shared_bytes: int) -> Finding:
    """Say whether data workers fit the machine.

    Args:
        settings: the `data` part of a config. batch_bytes: of one process's rows of a batch. processes_here: on this
            machine. cores: usable ones. shared_bytes: free in /dev/shm, through which batches come.
    """
    count = settings.num_workers * processes_here
    if not count:
        return Finding(OK, "workers", f"none (data.num_workers=0), {cores} cores")
    needed = (
        count * (2 * max(1, settings.prefetch) + 3) * batch_bytes
    )  # the most that grain 0.2.18 was seen to hold there
    text = f"{count} on {cores} cores, up to {needed / GB:.2f} of {shared_bytes / GB:.2f} GB in /dev/shm"
    if needed > shared_bytes:
        advice = "enlarge it (docker --shm-size) or lower data.num_workers or data.prefetch"
        return Finding(FIX, "workers", f"{text}: {advice}")
    if count > cores:
        return Finding(WARN, "workers", f"{text}: more workers than cores only take turns, lower data.num_workers")
    return Finding(OK, "workers", text)


def batch_bytes(config: Any, num_processes: int) -> int:
    """Return the bytes of one process's uint8 images of a batch."""
    size_px = config.data.image_size_px or 224  # workers decode imagenet alone
    return math.ceil(config.train.batch_size / num_processes) * size_px**2 * 3


def compile_cache(directory: str | None) -> Finding:
    """Say whether compiled programs outlive a process. directory: of JAX's persistent cache, None where it is off."""
    if not directory:
        text = "off: every start compiles anew; set JAX_COMPILATION_CACHE_DIR=DIRECTORY"
        return Finding(WARN, "compile cache", text)
    try:
        with tempfile.TemporaryFile(dir=nearest(pathlib.Path(directory))):
            pass
        files = [path for path in pathlib.Path(directory).glob("*") if path.is_file()]
    except OSError as error:
        return Finding(
            WARN, "compile cache", f"cannot write to {directory} ({error.strerror}): every start compiles anew"
        )
    used_gb = sum(path.stat().st_size for path in files) / GB
    return Finding(OK, "compile cache", f"{directory}, {len(files)} files, {used_gb:.2f} GB")


def proxies(environ: Mapping[str, str], num_processes: int) -> Finding:
    """Warn of proxies, behind which processes may not meet."""
    names = sorted(name for name in environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"))
    if num_processes > 1 and names:
        return Finding(WARN, "proxies", f"processes may hang behind {', '.join(names)}: unset them")
    return Finding(OK, "proxies", f"{', '.join(names) or 'none'}")


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split())
