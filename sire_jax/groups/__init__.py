"""Groups of labels: the file of them, and how they are made of what a network confuses."""

from sire_jax.groups import confusion
from sire_jax.groups.clustering import balanced, coarse, distances, make, mean_confusion, released
from sire_jax.groups.partition import Groups, load, save

__all__ = [
    "Groups",
    "balanced",
    "coarse",
    "confusion",
    "distances",
    "load",
    "make",
    "mean_confusion",
    "released",
    "save",
]
