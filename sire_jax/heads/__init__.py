"""Heads: from one or several endpoints of a backbone to one auxiliary output.

A part of ``HEADS`` is a head or a function that makes a family of them, a mapping by name.

A head is a Flax module with an ``endpoints`` attribute, the names of the features that it is called
with, in order: ``head(*features, train=…)``. It knows nothing else of the backbone.
"""

from sire_jax.heads.branch import Branch, branch
from sire_jax.heads.branch_blocks import (
    AveragePool,
    Dense,
    ExpandedInception,
    GlobalPool,
    Recalibration,
)
from sire_jax.heads.classifier import Classifier, ConvolutionalClassifier
from sire_jax.heads.combination import Combination
from sire_jax.heads.decoder import Decoder, decoders
from sire_jax.heads.exits import exits
from sire_jax.heads.identity import Identity

HEADS = {
    "classifier": Classifier,
    "convolutional_classifier": ConvolutionalClassifier,
    "decoders": decoders,
    "exits": exits,
    "identity": Identity,
    "branch": branch,
    # Last: it may be attached to those before it.
    "combination": Combination,
}

__all__ = [
    "HEADS",
    "AveragePool",
    "Branch",
    "Classifier",
    "Combination",
    "ConvolutionalClassifier",
    "Decoder",
    "Dense",
    "ExpandedInception",
    "GlobalPool",
    "Identity",
    "Recalibration",
    "branch",
    "decoders",
    "exits",
]
