"""Networks that learn from auxiliary outputs, in JAX and Flax."""

from sire_jax import signals

__version__ = "0.1.0"

# Before a program imports what takes seconds.
signals.listen()
