"""Builds the library beside its source, for a wheel: ``python -m sire_jax.layers.onednn``."""

from sire_jax.layers.onednn.library import SOURCE, build, file_name

build(SOURCE.with_name(file_name()))
