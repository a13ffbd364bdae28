"""Backbones: from images to logits and named endpoints.

A backbone is any Flax module that maps ``(image, train=…)`` to ``(logits, endpoints)``, where
``endpoints`` is a mapping of features by name, shallow to deep. It knows nothing of heads. One
that is written as a ``Plan`` of blocks can be mirrored: ``heads.decoders`` reads it backwards.
"""

from sire_jax.backbones.blocks import Block, Convolution, MaxPool, Residual
from sire_jax.backbones.cnn import cnn, vgg
from sire_jax.backbones.densenet import DenseLayers, Transition, densenet
from sire_jax.backbones.googlenet import Inception, googlenet
from sire_jax.backbones.pair import PairBranches, PairConvolutional, PairDense
from sire_jax.backbones.plan import Plan, Planned
from sire_jax.backbones.preactivation import Activation, PreActivation, Stem, preactivation_resnet
from sire_jax.backbones.resnet import resnet
from sire_jax.backbones.small import SmallCNN
from sire_jax.backbones.wide_resnet import wide_resnet

BACKBONES = {
    "pair_dense": PairDense,
    "pair_convolutional": PairConvolutional,
    "pair_branches": PairBranches,
    "small_cnn": SmallCNN,
    "cnn": cnn,
    "vgg": vgg,
    "resnet": resnet,
    "preactivation_resnet": preactivation_resnet,
    "wide_resnet": wide_resnet,
    "densenet": densenet,
    "googlenet": googlenet,
}

__all__ = [
    "BACKBONES",
    "Activation",
    "Block",
    "Convolution",
    "DenseLayers",
    "Inception",
    "MaxPool",
    "PairBranches",
    "PairConvolutional",
    "PairDense",
    "Plan",
    "Planned",
    "PreActivation",
    "Residual",
    "SmallCNN",
    "Stem",
    "Transition",
    "cnn",
    "densenet",
    "googlenet",
    "preactivation_resnet",
    "resnet",
    "vgg",
    "wide_resnet",
]
