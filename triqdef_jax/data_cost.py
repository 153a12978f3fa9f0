"""What the input costs: the streamed pipeline beside decoding and cropping alone, the device path of sets in memory beside a training step.

CPU seconds are those of the process and of the workers that decode for it. Nothing is trained.
"""

import contextlib
import dataclasses
import functools
import io
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import cv2
import jax
import numpy as np
import psutil

from triqdef_jax import config as config_lib
from triqdef_jax import data, sharding, shards
from triqdef_jax.data import images
from triqdef_jax.data.splits import evenly_spaced
from triqdef_jax.data.stream import Records, StreamData
from triqdef_jax.timing import Cost, check_rounds, machine, spread, spread_text

MIN_IMAGES = 1024  # of a streamed round, 1.5 s of one core; at least three batches
NUM_WARMUP_BATCHES = 2  # Threads and workers have started, and read ahead as far as they may.
_SETTLE_S = 1.0  # No image takes a thread as long.
# Stand-ins: as large, as many bytes and as hard to decode as the mean image of ImageNet; smooth noise at all scales.
_HEIGHT_PX, _WIDTH_PX = 375, 500
_OCTAVES_PX = (4, 8, 16, 32, 64, 128, 256)
_CONTRAST, _FALL, _JPEG_QUALITY = 100.0, 0.2, 90  # 104 kB on average
_NUM_PICTURES = 64  # drawn; the records repeat them


def measure(config, take_step: Callable[[], None], *, rounds: int = 5) -> dict:
    """Measure the input of a config.

    Args:
      config: validated config. take_step: takes one training step of it and waits for its end; called for sets in memory only.
      rounds: timed rounds.

    Returns:
      What was measured and on what, and the figures of `measure_stream` or of `measure_memory`.

    Raises:
      ValueError: no round, or damaged data. FileNotFoundError: CIFAR-10 is not prepared.
    """
    check_rounds(rounds)
    head = {
        "data": config.data.name,
        "image_size_px": config_lib.image_size_px(config),
        "batch_size": config.train.batch_size,
        "rounds": rounds,
        **machine(),
    }
    if config.data.name != "imagenet":
        return head | measure_memory(config, data.load(config.data), take_step, rounds=rounds)
    with contextlib.ExitStack() as held:
        settings = config.data.copy_and_resolve_references()
        settings.heldout_images = settings.train_images = 0  # 5,000 images would be decoded for nothing
        num = max(MIN_IMAGES, 3 * config.train.batch_size)
        num -= num % config.train.batch_size
        is_prepared = (data.resolve_dir(settings.dir) / "imagenet2012").is_dir()
        if not is_prepared:
            settings.dir = held.enter_context(tempfile.TemporaryDirectory(prefix="stand-ins-"))
            print(f"no ImageNet in {data.resolve_dir(config.data.dir)}: making {num} stand-ins", file=sys.stderr)
            write_stand_ins(settings.dir, num)
        loaded = data.load(settings)
        kind = {"records": "ImageNet" if is_prepared else "stand-ins, made for this measurement"}
        return head | kind | measure_stream(config, loaded, num, rounds=rounds)


def measure_stream(config, loaded: StreamData, num_images: int, *, rounds: int = 5) -> dict:
    """Decode `num_images` records by the pipeline as training uses it, and then alone: one loop over bytes in memory.

    Every round covers an epoch of the very same records, read from disk in the first one and from the system's cache later.

    Returns:
      `images`; mean `record_bytes`; `num_workers`, `prefetch`; images per second of one CPU and on the clock of `pipeline` and
      `alone`; `cpu_share`, pipeline over alone in each round, in images per CPU-second.
    """
    rows = loaded.train.rows[evenly_spaced(len(loaded.train), min(num_images, len(loaded.train)))]
    encoded = [loaded.train.source[int(row)]["image"] for row in rows]
    speeds = {"pipeline": [], "alone": []}
    with tempfile.NamedTemporaryFile(prefix="tally-") as tally:
        loaded = dataclasses.replace(loaded, train=_Counted(loaded.train.source, rows, tally.name))
        for number in range(rounds):
            speeds["pipeline"].append(_stream_epoch(config, loaded))
            speeds["alone"].append(_decode_alone(encoded, loaded.image_size_px, config.seed + number))
    return {
        "images": len(rows),
        "record_bytes": statistics.mean(map(len, encoded)),
        "num_workers": loaded.num_workers,
        "prefetch": loaded.prefetch,
        **{
            f"{name}_images_per_second": {clock: spread([speed[clock] for speed in found]) for clock in found[0]}
            for name, found in speeds.items()
        },
        "cpu_share": spread([a["cpu"] / b["cpu"] for a, b in zip(*speeds.values(), strict=True)]),
    }


@dataclasses.dataclass(frozen=True)
class _Counted(Records):
    """Records that leave a byte in a file for each that is decoded, in whatever process: what is read ahead counts as work done."""

    tally: str

    def decoded(self, record):
        example = super().decoded(record)
        os.write(_descriptor(self.tally), b".")
        return example


@functools.cache
def _descriptor(path):
    return os.open(path, os.O_WRONLY | os.O_APPEND)


def _stream_epoch(config, loaded):
    """Return images per second by clock over the second epoch; the last batches of the first one warm up."""
    steps, tally = len(loaded.train) // config.train.batch_size, loaded.train.tally
    batches = loaded.train_batches(
        seed=config.seed,
        batch_size=config.train.batch_size,
        start_step=steps - NUM_WARMUP_BATCHES,
        sharding=sharding.batch_sharding(sharding.data_mesh()),
    )
    with contextlib.closing(batches):
        _exhaust(batches, NUM_WARMUP_BATCHES)
        decoded, wall, cpu = os.path.getsize(tally), time.perf_counter(), _cpu_seconds()
        _exhaust(batches, steps)
        decoded, wall, cpu = os.path.getsize(tally) - decoded, time.perf_counter() - wall, _cpu_seconds() - cpu
    _settle(tally)
    return {"cpu": decoded / cpu, "wall": len(loaded.train) / wall}


def _settle(tally):
    """Wait until threads of the closed pipeline have ended what they were at: it would count as work of what is timed next."""
    before = -1
    while (now := os.path.getsize(tally)) != before:
        before = now
        time.sleep(_SETTLE_S)


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and its workers; a worker's come in steps of 10 ms."""
    workers = (psutil.Process(child.pid).cpu_times() for child in multiprocessing.active_children())
    return time.process_time() + sum(times.user + times.system for times in workers)


def _decode_alone(encoded, size_px, seed):
    rng, cost = np.random.default_rng(seed), Cost()

    def run():
        for image in encoded:
            images.random_resized_crop(rng, images.decode(image), size_px)

    cost.add(run)
    return {"cpu": len(encoded) / cost.cpu, "wall": len(encoded) / cost.wall}


def measure_memory(config, loaded: data.ImageData, take_step: Callable[[], None], *, rounds: int = 5) -> dict:
    """Make the batches of one epoch on the device, its new order included, and take one training step, in turn.

    Returns:
      `batches` of a round; seconds of one batch and of one step by clock; `share`, batch over step in each round, by clock.
    """
    batch_size = config.train.batch_size
    steps = loaded.num_train // batch_size
    batches = loaded.train_batches(
        seed=config.seed,
        batch_size=batch_size,
        start_step=steps - NUM_WARMUP_BATCHES,
        sharding=sharding.batch_sharding(sharding.data_mesh()),
    )
    costs = {"batch": [], "step": []}
    _exhaust(batches, NUM_WARMUP_BATCHES)
    for _ in range(NUM_WARMUP_BATCHES):
        take_step()
    for _ in range(rounds):
        for name, run in (("batch", lambda: _exhaust(batches, steps)), ("step", take_step)):
            costs[name].append(Cost())
            costs[name][-1].add(run)
    seconds = {
        clock: ([getattr(c, clock) / steps for c in costs["batch"]], [getattr(c, clock) for c in costs["step"]])
        for clock in ("cpu", "wall")
    }
    return {
        "model": config.model.name,
        "batches": steps,
        "batch_seconds": {clock: spread(batch) for clock, (batch, _) in seconds.items()},
        "step_seconds": {clock: spread(step) for clock, (_, step) in seconds.items()},
        "share": {clock: spread([a / b for a, b in zip(*pair, strict=True)]) for clock, pair in seconds.items()},
    }


def _exhaust(batches, num):
    for _ in range(num):
        jax.block_until_ready(next(batches))


def write_stand_ins(folder: str | pathlib.Path, num: int) -> None:
    """Write `num` training images of ImageNet's size in bytes and pixels, and one for validation, in its layout."""
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(0)
    pictures = [_picture(rng) for _ in range(_NUM_PICTURES)]

    def read(row: int) -> dict:
        encoded = pictures[row % _NUM_PICTURES]
        return {"file_name": f"{row}.JPEG", "image": io.BytesIO(encoded), "label": row % 1000}

    builder = tfds.builder("imagenet2012", data_dir=folder, file_format="array_record")
    names, size = [str(row) for row in range(num)], sum(map(len, pictures)) * num // _NUM_PICTURES
    shards.write(
        builder,
        {"train": shards.Examples(names, size, read), "validation": shards.Examples(names[:1], len(pictures[0]), read)},
    )


def _picture(rng: np.random.Generator) -> bytes:
    total = np.full((_HEIGHT_PX, _WIDTH_PX, 3), 128, np.float32)
    for side in _OCTAVES_PX:
        noise = rng.standard_normal((side * 3 // 4, side, 3), np.float32)
        total += cv2.resize(noise, (_WIDTH_PX, _HEIGHT_PX), interpolation=cv2.INTER_CUBIC) * _CONTRAST / side**_FALL
    quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    return cv2.imencode(".jpg", np.uint8(np.clip(total, 0, 255)), quality)[1].tobytes()


def text(figures: dict) -> str:
    """Return the figures as lines of text, median (smallest..largest)."""
    head = (
        f"{figures['data']}, {figures['image_size_px']} px, batch {figures['batch_size']}; {figures['num_devices']} x "
        f"{figures['device']}, {figures['cores']} cores, jax {figures['jax']}; {figures['rounds']} interleaved rounds"
    )
    return "\n".join([head, *(_stream_lines(figures) if "records" in figures else _memory_lines(figures))])


def _stream_lines(figures: dict) -> Iterator[str]:
    yield (
        f"records: {figures['records']}; {figures['images']} of {figures['record_bytes'] / 1000:.0f} kB, "
        f"{figures['num_workers']} workers, prefetch {figures['prefetch']}"
    )
    yield f"{'':18}{'images per CPU-second':>30}{'images per second':>30}"
    for name in ("pipeline", "alone"):
        speed = figures[f"{name}_images_per_second"]
        yield f"{name:18}" + "".join(f"{_whole(speed[clock]):>30}" for clock in ("cpu", "wall"))
    yield f"{'pipeline / alone':18}{spread_text(figures['cpu_share']):>30}"


def _whole(values: dict) -> str:
    return f"{values['median']:.0f} ({values['min']:.0f}..{values['max']:.0f})"


def _memory_lines(figures: dict) -> Iterator[str]:
    yield f"{'':18}{'CPU seconds':>34}{'seconds':>34}"
    yield _seconds_line("batch", figures["batch_seconds"])
    yield _seconds_line(f"step, {figures['model']}", figures["step_seconds"])
    yield _seconds_line("batch / step", figures["share"])


def _seconds_line(name: str, by_clock: dict) -> str:
    cells = (by_clock[clock] for clock in ("cpu", "wall"))
    return f"{name:18}" + "".join(f"{c['median']:.5f} ({c['min']:.5f}..{c['max']:.5f})".rjust(34) for c in cells)
