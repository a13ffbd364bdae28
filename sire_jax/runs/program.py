"""Compiled programs of a job, whose processes wait for each other while one compiles."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sire_jax.job import distributed


class Program:
    """A compiled function. A call that compiles may take long, which the other processes are told.

    Args:
        function: The function.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function, self._compiled = function, set[Any]()

    def __call__(self, *args: Any) -> Any:
        """Calls the function; each process of the job has to."""
        if jax.process_count() == 1:
            return self._function(*args)
        distributed.arrive()
        leaves, structure = jax.tree.flatten(args)
        # What JAX compiles anew for.
        signature = structure, tuple((np.shape(x), getattr(x, "dtype", type(x))) for x in leaves)
        if signature in self._compiled:
            return self._function(*args)
        with distributed.patience("compiling"):
            results = jax.block_until_ready(self._function(*args))
        self._compiled.add(signature)
        return results

    def memory(self, *args: Any) -> int | None:
        """Returns the bytes of arguments, results and all between; ``None`` if that isn't told."""
        # A function around `jax.pmap` has none.
        if not hasattr(self._function, "lower"):
            return None
        planned = self._function.lower(*args).compile().memory_analysis()
        if planned is None:
            return None
        # Donated arguments and the results in their place are the same bytes.
        total = planned.argument_size_in_bytes + planned.output_size_in_bytes
        return int(total - planned.alias_size_in_bytes + planned.temp_size_in_bytes)
