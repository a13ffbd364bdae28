"""Where the arrays of runs lie on the devices of a job, and programs that put them there."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from sire_jax.runs import parallel
from sire_jax.runs.program import Program

PyTree = Any


class Placement:
    """The devices of a job, and what lies on which of them.

    Args:
        config: The config of the runs.

    Attributes:
        mesh: The devices.
        everywhere: The place of what is the same on all devices.
        of_runs: The place of what each run has, along the first axis.
        sharing: How many devices share a batch.

    Raises:
        ValueError: If the devices are not what the config says.
    """

    def __init__(self, config: ConfigDict):
        self._at_once = config.seeds_at_once
        self.mesh = parallel.device_mesh(
            config.devices, config.devices_share, config.batch_size, config.seeds
        )
        self.everywhere = NamedSharding(self.mesh, PartitionSpec())
        spread = "runs" in self.mesh.axis_names
        self.of_runs = (
            NamedSharding(self.mesh, PartitionSpec("runs")) if spread else self.everywhere
        )
        # Where the runs are spread, a device has the whole batches of its own.
        self.sharing = 1 if spread else self.mesh.size

    def place(self, tree: PyTree) -> PyTree:
        """Puts arrays of the host, which all processes have, on all devices."""
        if jax.process_count() == 1:
            return jax.device_put(tree, self.everywhere)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self.everywhere, np.asarray(x)), tree
        )

    def program(
        self, function: Callable[..., Any], shared: tuple[int, ...], result: Any = None, **jit: Any
    ) -> Program:
        """Compiles a function of one run for all of them (``over_seeds``, ``over_runs``).

        Args:
            function: Any function of arrays.
            shared: Positions of the arguments that are the same for all runs.
            result: Where the results are; on all devices by default.
            **jit: Arguments of ``jax.jit``.

        Returns:
            The function with a leading axis of runs.
        """
        runs = parallel.over_seeds(function, shared, self._at_once)
        runs = parallel.over_runs(runs, shared, self.mesh)
        return Program(jax.jit(runs, out_shardings=result or self.everywhere, **jit))
