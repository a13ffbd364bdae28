"""What runs ask of their data, wherever the images are: on the devices, or streamed to them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from sire_jax.data.augmentation import Batch
from sire_jax.data.contents import Contents
from sire_jax.metrics import Metrics
from sire_jax.state import TrainState

PyTree = Any
# ``(params, model_state, batch, mask, fitted)`` to sums over what is masked in.
Measure = Callable[[PyTree, PyTree, Batch, jax.Array, PyTree], PyTree]
# Measures a split: ``(params, model_state, fitted, split)`` to the sums, for each run.
Totals = Callable[[PyTree, PyTree, Mapping[str, PyTree], str], PyTree]
Taken = tuple[TrainState, Metrics, dict[str, jax.Array]]


class Feed(Protocol):
    """The examples of runs, and the programs over them.

    Attributes:
        names: For each kind of label, of the images, the names of its classes.
        contents: What the data are, wherever they lie.
        examples: The examples of each split, as indices, ``[runs, n, …]``.
        steps_per_epoch: Whole batches of an epoch.
    """

    names: Mapping[str, tuple[str, ...]]
    contents: Contents
    examples: Mapping[str, Any]
    steps_per_epoch: int

    @property
    def arrays(self) -> PyTree:
        """All images and labels.

        Raises:
            ValueError: If they are streamed.
        """

    def order(self, state: TrainState, epoch: int) -> Any:
        """Returns the examples of an epoch in their order, for ``take_steps``.

        Args:
            state: The states of all runs, whose keys say the order.
            epoch: Its number, from 0.
        """

    def take_steps(
        self, state: TrainState, sums: Metrics, order: Any, first: int, count: int
    ) -> Taken:
        """Takes steps in all runs; see ``parallel.over_steps``.

        Args:
            state: The states of all runs, which are donated.
            sums: Of the metrics so far, which are donated.
            order: What ``order`` returned of the epoch.
            first: The first step of the epoch that is taken.
            count: How many.
        """

    def planned_memory(self, state: TrainState, sums: Metrics) -> int | None:
        """Returns the bytes that a step takes with all arrays, as the compiler plans; may be None.

        The program is compiled; the call that follows doesn't compile it again.
        """

    def totals(self, measure: Measure, crop: str) -> Totals:
        """Makes the program that measures a split.

        Args:
            measure: Measures a batch.
            crop: Which crops of the images are measured; see ``Forward.ready``.
        """

    def predictions(self, predict: Callable[..., Any]) -> Callable[..., Any]:
        """Makes the program ``(params, model_state, split, every)`` to what is predicted.

        Args:
            predict: Predicts a batch, ``(params, model_state, batch)``. Of a split each ``every``th
                example counts.
        """

    def gradients(
        self, flow: Callable[[TrainState, Batch], Metrics]
    ) -> Callable[[TrainState, int], Metrics]:
        """Makes the program ``(state, epoch)`` that measures an epoch's first batch.

        Args:
            flow: Measures the gradients of a batch.
        """

    def look(self, split: str, chosen: int | Sequence[int], crop: str = "central") -> Batch:
        """Returns examples of a split of the first run, to look at.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.
            chosen: How many, the first ones, all if there are fewer; or their numbers.
            crop: Which crops of the images; see ``Forward.ready``.
        """

    def newly_skipped(self) -> list[str]:
        """Returns what is wrong with the damaged images skipped since the last call."""

    def number_skipped(self) -> int:
        """Returns how many damaged images have been skipped, by all processes."""


class NoFeed:
    """No data: for what needs only weights and the names of classes.

    Args:
        names: For each kind of label the names of its classes.

    Raises:
        ValueError: If anything else is asked for.
    """

    def __init__(self, names: Mapping[str, tuple[str, ...]]):
        self.names = names

    def __getattr__(self, name: str) -> Any:
        # Python asks so whether an object can be copied or pickled, and takes no for an answer.
        if name.startswith("__"):
            raise AttributeError(name)
        raise ValueError(f"This needs the data of the run ({name}), which were not loaded.")


def index_of(chosen: int | Sequence[int]) -> slice | np.ndarray:
    """Returns the index of the first examples, or of those with some numbers."""
    return slice(chosen) if isinstance(chosen, int) else np.asarray(chosen)
