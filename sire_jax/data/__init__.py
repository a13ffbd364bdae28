"""Data: sources of images, tasks that say what an example is, augmentation, the on-device feed."""

from sire_jax.data.dataset import Dataset, Source, stratified
from sire_jax.data.sources import load

__all__ = ["Dataset", "Source", "load", "stratified"]
