"""Heads: from one or several endpoints of a backbone to one auxiliary output.

A head is a Flax module with an ``endpoints`` attribute, the names of the features that it is called
with, in order: ``head(*features, train=…)``. It knows nothing else of the backbone.
"""

from sire_jax.heads.classifier import Classifier
from sire_jax.heads.identity import Identity

HEADS = {"classifier": Classifier, "identity": Identity}
