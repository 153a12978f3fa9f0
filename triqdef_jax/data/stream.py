"""Sets too large for memory: encoded examples at random access, decoded on the host; grain reads ahead.

Layout: images uint8 [B, S, S, 3] in 0..255 (RGB), labels int32 [B]; sent to the device as uint8.
Left out: the crops themselves (`images`) and sets held in memory (`memory`). grain is imported on use: 1.3 s.
"""

import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from triqdef_jax import entry
from triqdef_jax.data import images
from triqdef_jax.data.splits import Split, check_at_least, check_batching, choose, pad_batch, split_batches


class RecordError(entry.LocalError):
    """A record on disk that cannot be read, or is no image; the message names it and says what to do."""


@dataclass(frozen=True)
class Records:
    """Examples of a prepared split, at random access and picklable, for grain's workers.

    Attributes:
        source: sequence of {'image': bytes, 'label': int, ...}.
        rows: int64 [N], which examples of `source` belong, in this order; they are the ids.
    """

    source: Sequence[dict[str, Any]]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return {'image': uint8 [H, W, 3], 'label': int32, 'id': int64}; raises as `encoded` and `decoded`."""
        return self.decoded(self.encoded(index))

    def encoded(self, index: int) -> dict[str, Any]:
        """Return {'image': bytes, 'label': int32, 'id': int64}; raise RecordError where the disk fails."""
        row = self.rows[index]
        try:
            record = self.source[int(row)]
        except RuntimeError as error:  # array_record's word for a missing file and for bytes that miss their checksum
            raise RecordError(f"record {row} cannot be read ({error}); prepare the data anew") from error
        return {"image": record["image"], "label": np.int32(record["label"]), "id": row}

    def decoded(self, record: dict[str, Any]) -> dict[str, Any]:
        """Return what `encoded` returned with the image as uint8 [H, W, 3]; raise RecordError where it is none."""
        try:
            return record | {"image": images.decode(record["image"])}
        except ValueError as error:
            raise RecordError(f"record {record['id']}: {error}") from error


def centre_split(records: Records, size_px: int) -> Split:
    """Decode all of `records` into memory by centre crop, images uint8 [N, size_px, size_px, 3]."""
    pixels = np.empty((len(records), size_px, size_px, 3), np.uint8)
    labels = np.empty(len(records), np.int32)

    def fill(index: int) -> None:
        example = _eval_example(records, index, size_px=size_px)
        pixels[index], labels[index] = example["images"], example["labels"]

    with futures.ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(len(records))))  # the list re-raises what a thread met
    return Split(pixels, labels, records.rows)


@dataclass(frozen=True)
class StreamData:
    """A set that is decoded while it is read.

    Attributes:
        name, num_classes, image_size_px: as in `ImageData`.
        train, test: examples on disk.
        heldout: images taken out of the training split (never trained on), decoded once by centre crop.
        num_workers: processes that decode; 0 decodes in threads of this one.
        prefetch: batches made ahead in every decoding process, each by a thread of its own; at least 1 is used.
    """

    name: str
    num_classes: int
    image_size_px: int
    train: Records
    heldout: Split
    test: Records
    num_workers: int
    prefetch: int

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return len(self.train)

    def train_batches(
        self, *, seed: int, batch_size: int, start_step: int, sharding: NamedSharding | None = None
    ) -> Iterator[dict[str, jax.Array]]:
        """Yield augmented training batches for ever, from `start_step` on.

        Row r of step s is position s * B + r of one endless stream: every N positions are a new permutation, and the
        crop is drawn from (seed, position). A process decodes the rows that lie on its devices, so neither the number
        of processes nor of workers changes a global batch. Workers are spawned: the main module needs its guard, and
        absl flags must have been parsed. Close the iterator (or drop it) to end them.

        Args:
            seed: the run's seed, 0 .. 2**32 - 1.
            batch_size: B, images over all processes, at most N.
            start_step: number of batches to pass over; what follows is what an uninterrupted run would have met.
            sharding: where the batch axis lies, contiguous rows to each process; None for the default device.

        Returns:
            Iterator of {'images': uint8 [B, S, S, 3], 'labels': int32 [B]} on the device.

        Raises:
            ValueError: batch_size is outside 1..N, or start_step is negative.
        """
        check_batching(batch_size, start_step, self.num_train)
        return self._train_batches(seed, batch_size, start_step, sharding)

    def _train_batches(self, seed, batch_size, start_step, sharding):
        rank, num_ranks = _rank_of_rows(batch_size, sharding)
        for batch in self.local_batches(seed, batch_size // num_ranks, start_step, rank, num_ranks):
            yield {name: _to_devices(rows, batch_size, sharding) for name, rows in batch.items()}

    def local_batches(
        self, seed: int, num_rows: int, start_step: int, rank: int, num_ranks: int
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield the rows of `train_batches` that process `rank` of `num_ranks` decodes, `num_rows` of each step, on the host."""
        import grain

        places = grain.MapDataset.range(len(self.train)).seed(seed).shuffle().repeat().map_with_index(_place)
        # Batches of one process's size, of which it takes every num_ranks-th: contiguous rows of the global batch.
        batches = places.batch(num_rows)[rank::num_ranks][start_step:]
        # A whole batch is one call: a call per example, and joining them, would cost 5 % of what decoding costs.
        return self._read_ahead(batches.map(functools.partial(_train_batch, self.train, seed, self.image_size_px)))

    def eval_batches(self, split: str, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield a split once, centre-cropped and in order, in batches of one static size.

        Args:
            split: 'train', 'heldout' or 'test'.
            batch_size: B.

        Returns:
            Iterator of {'images': uint8 [B, S, S, 3], 'labels': int32 [B], 'ids': int64 [B], 'mask': float32 [B]};
            rows that only fill up the last batch have mask 0, id -1, label 0 and a black image.

        Raises:
            ValueError: unknown split, or batch_size below 1.
        """
        check_at_least("batch_size", batch_size, 1)
        part = choose({"train": self.train, "heldout": self.heldout, "test": self.test}, split, "split")
        return split_batches(part, batch_size) if isinstance(part, Split) else self._eval_batches(part, batch_size)

    def _eval_batches(self, records, batch_size):
        import grain

        example = functools.partial(_eval_example, records, size_px=self.image_size_px)
        for batch in self._read_ahead(grain.MapDataset.range(len(records)).map(example).batch(batch_size)):
            yield pad_batch(batch, batch_size)

    def _read_ahead(self, batches):
        import grain

        ahead = max(1, self.prefetch)
        stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead))
        if self.num_workers:
            options = grain.MultiprocessingOptions(self.num_workers, per_worker_buffer_size=ahead)
            stream = stream.mp_prefetch(options, _leave_signals_to_the_run)
        iterator = iter(stream)
        try:
            yield from iterator
        finally:
            iterator.close()  # else workers and their shared memory outlive the run


def _leave_signals_to_the_run(worker: int, num_workers: int) -> None:
    """Ignore what a scheduler or a terminal sends to all processes of a run, and end with the run, however that ends."""
    del worker, num_workers
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)

    def end_with_the_run():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_the_run, daemon=True).start()


def _place(position: int, row: int) -> np.ndarray:
    return np.array([position, row])


def _train_batch(records: Records, seed: int, size_px: int, places: np.ndarray) -> dict[str, np.ndarray]:
    """Decode and crop the examples of `places`, int64 [B, 2] of (position in the endless stream, row of `records`)."""
    # One kind of work at a time: decoding empties the processor's caches, and between two images all else takes 0.3 ms longer.
    rngs = [np.random.Generator(np.random.Philox(key=[seed, position])) for position, _ in places]
    read = [records.encoded(row) for _, row in places]
    pixels = np.empty((len(places), size_px, size_px, 3), np.uint8)
    for slot, (rng, record) in enumerate(zip(rngs, read, strict=True)):
        pixels[slot] = images.random_resized_crop(rng, records.decoded(record)["image"], size_px)
    return {"images": pixels, "labels": np.array([record["label"] for record in read])}


def _eval_example(records: Records, index: int, *, size_px: int) -> dict[str, np.ndarray]:
    record = records[index]
    return {"images": images.centre_crop(record["image"], size_px), "labels": record["label"], "ids": record["id"]}


def _rank_of_rows(batch_size: int, sharding: NamedSharding | None) -> tuple[int, int]:
    """Return (r, n): the devices of this process hold the r-th of n equal runs of contiguous rows of the batch."""
    if sharding is None:
        return 0, 1
    held = [index[0].indices(batch_size) for index in sharding.addressable_devices_indices_map((batch_size,)).values()]
    start, stop = min(first for first, _, _ in held), max(last for _, last, _ in held)
    return start // (stop - start), batch_size // (stop - start)


def _to_devices(rows: np.ndarray, batch_size: int, sharding: NamedSharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(rows)
    return jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
