"""Batches of images that are read and decoded while the network trains, through grain.

A batch is a function of the seed and of its place in the epoch alone: threads, worker processes and
the batch to begin with change nothing. Nothing here needs JAX.
"""

import gc
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from sire_jax.data import images
from sire_jax.data.images import DamagedImageError
from sire_jax.data.records import Records
from sire_jax.job import signals

# What is done about a damaged image.
DAMAGED = ("raise", "skip")
# Batches that are ready, or being made, beside the one in use: of this process, of each worker.
_AHEAD = 2
_AHEAD_OF_WORKER = 1
# Of a batch, for each thread: threads take parts, as single small images would cost more to pass on
# than to decode.
_PARTS = 4


class WorkerError(RuntimeError):
    """A worker process ended before its batches were made."""


class Batch(NamedTuple):
    """A batch, or a process's share of it.

    Attributes:
        arrays: ``{"image": [b, h, w, c], "<kind of label>": [b], …, "intact": [b]}``, uint8, int32
            and bool. Where it is not intact, another image of the share is in its place, with its
            labels: the next intact one.
        damaged: What is wrong with the images that are not intact, by name.
    """

    arrays: dict[str, np.ndarray]
    damaged: tuple[str, ...]


@dataclass(frozen=True)
class Transform:
    """What is made of a decoded image; its sizes are sides in pixels.

    >>> Transform((256, 256, 3), resize=256).output
    (256, 256, 3)
    >>> Transform((256, 256, 3), resize=256, crop=224, random=True).output
    (224, 224, 3)

    Attributes:
        shape: ``(h, w, c)`` of images as the network's program gets them, but for random crops.
        resize: What the shorter side is scaled to, of which the central square is taken
            (``images.central_square``); 0: nothing.
        crop: Side of the squares that are made at random.
        random: Whether, in place of all that, a random part is scaled to ``crop``
            (``images.random_square``).

    Raises:
        ValueError: If random squares have no side, or what is scaled is not a square of that side.
    """

    shape: tuple[int, int, int]
    resize: int = 0
    crop: int = 0
    random: bool = False

    def __post_init__(self) -> None:
        images.check_channels(self.shape[-1])
        if self.random and self.crop < 1:
            raise ValueError(
                f"crop is {self.crop}, but random_resized_crop needs the side of the squares to"
                " make; give it, such as crop=224."
            )
        square = (self.resize, self.resize, self.shape[-1])
        if self.resize < 0 or (self.resize and tuple(self.shape) != square):
            raise ValueError(
                f"shape is {tuple(self.shape)} and resize {self.resize};"
                " images that are scaled have the shape (resize, resize, channels)."
            )

    @property
    def output(self) -> tuple[int, int, int]:
        """The shape of what is made."""
        return (self.crop, self.crop, self.shape[-1]) if self.random else self.shape


def batches(
    records: Records,
    examples: np.ndarray,
    transform: Transform,
    seed: Sequence[int],
    first: int = 0,
    share: slice = slice(None),
    workers: int = 0,
    threads: int = 8,
    damaged: str = "raise",
) -> "Stream":
    """Makes the batches of an epoch, ahead of their use.

    Random parts of the image in column j of step i follow from ``(*seed, i, j)``, whatever the
    share. To end a stream early, ``close`` it or delete it: threads and processes end with it.
    About two batches are kept ready, and three for each worker process.

    Args:
        records: The images.
        examples: Indices ``[steps, b]`` of the images of each batch.
        transform: What is made of each image.
        seed: Integers, at least 0, of the run and the epoch.
        first: The step to begin with, in 0..steps.
        share: Which images of a batch are made, of its b: those of this process.
        workers: Processes that read and decode, batch by batch; 0: this one does.
        threads: Threads that share the images of a batch, in each of these processes.
        damaged: ``"raise"`` an error on an image that can't be decoded; or ``"skip"`` it.

    Returns:
        An iterator over the batches, from step ``first`` on.

    Raises:
        ValueError: If an argument is out of range, or an image has another size than the transform
            says, which the message names.
        DamagedImageError: If an image is damaged, and with ``"skip"``, if all images of a share
            are.
        WorkerError: If a worker process died.
    """
    if damaged not in DAMAGED:
        raise ValueError(f"damaged is '{damaged}'; it should be one of {DAMAGED}.")
    for name, value, least in (("workers", workers, 0), ("threads", threads, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}; it should be at least {least}.")
    steps, images_of_a_batch = examples.shape
    if not 0 <= first <= steps:
        raise ValueError(f"The first step is {first}; it should be in 0..{steps}.")
    columns = range(images_of_a_batch)[share]
    if not columns:
        raise ValueError(f"{share} of batches of {images_of_a_batch} images is nothing.")
    maker = _Maker(
        records=records,
        examples=examples[:, share],
        columns=columns,
        transform=transform,
        seed=tuple(seed),
        threads=threads,
        skips=damaged == "skip",
    )
    return Stream(_dataset(maker, range(first, steps), workers))


@dataclass(frozen=True)
class _Maker:
    """Makes a process's share of a batch; see ``batches``."""

    records: Records
    examples: np.ndarray
    columns: range
    transform: Transform
    seed: tuple[int, ...]
    threads: int
    skips: bool

    def __call__(self, step: int) -> Batch:
        places = np.arange(len(self.columns))
        parts = np.array_split(places, min(len(places), _PARTS * self.threads))
        with ThreadPoolExecutor(self.threads) as pool:
            examples = list(chain.from_iterable(pool.map(partial(self._part, step), parts)))
        errors = [example for example in examples if isinstance(example, DamagedImageError)]
        intact = np.array([not isinstance(example, DamagedImageError) for example in examples])
        messages = tuple(map(str, errors))
        if not intact.any():
            raise DamagedImageError(
                f"All {len(examples)} images of a batch are damaged, which leaves none to take in"
                f" their place: {messages[0]}"
            )
        # Batches keep their size, as for another one the step would be compiled again.
        filled: list[Any] = [examples[i] for i in _replaced(intact)]
        arrays = {"image": np.stack([image for image, _ in filled])}
        for kind in self.records.classes:
            arrays[kind] = np.array([labels[kind] for _, labels in filled], np.int32)
        return Batch({**arrays, "intact": intact}, messages)

    def _part(self, step: int, places: np.ndarray) -> list[Any]:
        return [self._example(step, int(place)) for place in places]

    def _example(
        self, step: int, place: int
    ) -> tuple[np.ndarray, dict[str, int]] | DamagedImageError:
        index = int(self.examples[step, place])
        try:
            image, labels = self.records.example(index)
        except DamagedImageError as error:
            if self.skips:
                return error
            raise error.advised() from error
        return self._transformed(image, step, place, index), labels

    def _transformed(self, image: Any, step: int, place: int, index: int) -> np.ndarray:
        transform = self.transform
        if transform.random:
            # By the column in the whole batch: the same image whichever process makes it.
            generator = np.random.default_rng((*self.seed, step, self.columns[place]))
            image = images.random_square(image, transform.crop, generator)
        elif transform.resize:
            image = images.central_square(image, transform.resize)
        pixels = images.to_array(image)
        if pixels.shape != transform.output:
            height, width, channels = pixels.shape
            raise ValueError(
                f"{self.records.name(index)} has {height} x {width} pixels and {channels} channels;"
                f" the shape asked for is {transform.shape}. Give the size of the images"
                " (config.data.shape), or scale them to one (--config.data.resize=SIDE)."
            )
        return pixels


def _replaced(intact: np.ndarray) -> np.ndarray:
    """Returns for each place the next intact one, ``[b]``; after the last comes the first."""
    places = np.flatnonzero(intact)
    return places[np.searchsorted(places, np.arange(len(intact))) % len(places)]


class Stream(Iterator[Batch]):
    """Batches, one after another; see ``batches``."""

    def __init__(self, dataset: Any) -> None:
        self._iterators = [iter(dataset)]
        self._first = [_start(self._iterators[0])]
        # Also called when nothing holds the stream any more, and at the program's end, while the
        # modules are there that closing needs.
        self._end = weakref.finalize(self, _close, self._iterators, self._first)

    def __next__(self) -> Batch:
        if not self._iterators:
            raise StopIteration
        try:
            arrays, damaged = self._first[0].result() if self._first else next(self._iterators[0])
        except (Exception, KeyboardInterrupt) as error:
            self.close()
            if isinstance(error, RuntimeError) and "terminated unexpectedly" in str(error):
                raise WorkerError(
                    "A worker process that decodes images died (it was killed, or memory or"
                    f" /dev/shm ran out): {error} Take fewer workers (--config.data.workers=N),"
                    " or smaller batches."
                ) from error
            raise
        self._first.clear()
        # A copy of what came through shared memory, which would have to be freed in time.
        owned = {
            kind: values if values.base is None else np.array(values)
            for kind, values in arrays.items()
        }
        return Batch(owned, damaged)

    def close(self) -> None:
        """Ends threads and processes; there are no further batches."""
        self._end()


def _start(iterator: Any) -> Future[Batch]:
    """Has the first batch made, and those ahead, in threads and processes that signals pass by."""
    # Signals that end a job go to all of its processes; what becomes of these is the main one's
    # business. They inherit the mask, so that no signal is early enough to end them. What tracks
    # resources is started ahead of it: Python unblocks two of the signals as it starts that.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    try:
        pool = ThreadPoolExecutor(1, "stream")
        first = pool.submit(next, iterator)
        pool.shutdown(wait=False)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return first


def _close(iterators: list[Any], first: list[Future[Batch]]) -> None:
    wait(first)
    first.clear()
    while iterators:
        iterators.pop().close()
    # Grain's iterators are in cycles, and hold shared memory.
    gc.collect()


def _dataset(maker: _Maker, steps: range, workers: int) -> Any:
    """Makes grain's data set of the batches of these steps."""
    import grain

    dataset = grain.MapDataset.range(steps.start, steps.stop).map(maker)
    if not workers:
        # One thread for batches: those of ``_Maker`` share the images of each.
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
        return dataset.to_iter_dataset(ahead)
    if not flags.FLAGS.is_parsed():
        # Grain has flags, and asks them even in a program that has none.
        flags.FLAGS.mark_as_parsed()
    # A worker makes its batches one after another, and its queue keeps the next one ready.
    one_by_one = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    processes = grain.MultiprocessingOptions(
        num_workers=min(workers, len(steps)), per_worker_buffer_size=_AHEAD_OF_WORKER
    )
    return dataset.to_iter_dataset(one_by_one).mp_prefetch(processes, worker_init_fn=_start_worker)


def _start_worker(index: int, count: int) -> None:
    """Prepares a worker process: it ends when the one that started it is gone, even if killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
