"""Backbones: from images to logits and named endpoints.

A backbone is any Flax module that maps ``(image, train=…)`` to ``(logits, endpoints)``, where
``endpoints`` is a mapping of features by name, shallow to deep. It knows nothing of heads.
"""

from sire_jax.backbones.cnn import cnn, vgg
from sire_jax.backbones.densenet import densenet
from sire_jax.backbones.googlenet import googlenet
from sire_jax.backbones.pair import PairBranches, PairConvolutional, PairDense
from sire_jax.backbones.preactivation import preactivation_resnet
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
