"""SIRe-Networks (Avola, Cinque, Fagioli and Foresti, 2022) on CIFAR-100.

``configs/sire.py:cnn``, ``vgg16``, ``vgg19``, ``resnet34``, ``resnet50``, ``googlenet``; each also
with ``_base``, the bare network; and each but ``cnn`` with ``_imagenet`` (ahead of ``_base``):
224 x 224 pixels and 1000 classes, the sizes of Table 4; their images are streamed.

Settings that the paper prints are as printed, but for one: Eq. 1 divides the cross entropy by the
number of classes, with which lambda would weigh a hundred times more (``equation_1`` below). It
leaves open, among others, what ends a decoder, initial values, the rate of dropout and the size of
a batch: ``docs/results/sire.md`` says what was chosen and why. Other readings are options behind
commas, ``configs/sire.py:cnn,linear``::

    linear           decoders end in a convolution alone: diverges at full width
    sigmoid          in a sigmoid
    heavy_ball       in a convolution alone, with momentum 0.9 but not Nesterov's
    pytorch          initial values of all layers are those of PyTorch's, as those of ``cnn`` are
    he               convolutions of ``cnn`` have those of He et al. (2015), too: it learns later
    equation_1       the cross entropy divided by the number of classes
    summed           squared errors summed over pixels, not averaged: diverges at full width
    no_decoder_norm  decoders without batch norm in their units (cnn; those of vgg have none)

And no reading: ``few_images``, what two cores can carry of ``cnn``: 16 x 16 pixels, 2,000 training
images, 40 epochs (``configuration.few_images``), a quarter of the width, 128 hidden units twice
without dropout, batches of 32, the last weights.

The three parts of SIRe are settings::

    S   long skip connections      --config.heads.decoder.skips=False
    I   auto-encoders              --config.heads.decoder.stages="()", or any of them: "(1, 3)"
    Re  short residual connections --config.backbone.residuals=False (cnn and vgg)

Of their seven combinations Table 1 prints five, beside the baseline: S without I is the network
without either, as there is nothing to skip to. Lambda is
``--config.objectives.decoder.weight=0.1``, or ``….weights="(0.1, 0.2, 0.2, 0.3)"``, one for each
decoder, or in a config file a schedule::

    fading = {"name": "linear", "init_value": 0.2, "end_value": 0.0, "transition_steps": 1}
    config.objectives.decoder = objective(
        "decoder", "image", "mean_squared_error", weight={**fading, "unit": "run"}
    )

Where a run diverges: ``--config.optimizer.clip=1``, a warm-up over a share of the run,
``--config.optimizer.learning_rate.warmup=0.025``, or a constant rate,
``--config.optimizer.learning_rate=0.001``.

Also of use: ``--config.backbone.dtype=bfloat16``, ``--config.heads.decoder.remat=True`` (decoders
computed again for the gradient), ``--config.backbone.width=0.25 --config.epochs=10`` (a smaller
network, a shorter run), ``--config.gradient_flow_every=1`` (Fig. 3),
``--config.heads.decoder.value_range`` (of normalized images).
"""

import math
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from sire_jax import configuration, registry
from sire_jax.configuration import augmentation, backbone, head, objective, optimizer

# The backbone, the number of decoders, and lambda (Table 4).
_NETWORKS: dict[str, tuple[dict[str, Any], int, float]] = {
    "cnn": ({"name": "cnn"}, 4, 0.2),
    "vgg16": ({"name": "vgg", "depth": 16}, 5, 0.2),
    "vgg19": ({"name": "vgg", "depth": 19}, 5, 0.2),
    "resnet34": ({"name": "resnet", "depth": 34}, 5, 0.21),
    "resnet50": ({"name": "resnet", "depth": 50}, 5, 0.21),
    "googlenet": ({"name": "googlenet"}, 4, 0.19),
}
# The weight of GoogLeNet's own auxiliary classifiers (Szegedy et al., 2015, Section 5).
_AUXILIARY_WEIGHT = 0.3


# Readings of what the paper leaves open: what ends a decoder, and initial values.
_ENDS = {"linear": "linear", "sigmoid": "sigmoid", "heavy_ball": "linear"}
_INITIAL = {"pytorch": "pytorch", "he": "modules"}
# Of losses, and of what is within decoders.
_OTHERS = ("equation_1", "summed", "no_decoder_norm")
_FEW_IMAGES = "few_images"


def _variants() -> dict[str, tuple[str, bool, bool]]:
    """Returns ``{variant: (network, ImageNet, bare network)}``."""
    variants = {}
    for network in _NETWORKS:
        for imagenet in (False, True) if network != "cnn" else (False,):
            for base in (False, True):
                name = f"{network}{'_imagenet' * imagenet}{'_base' * base}"
                variants[name] = (network, imagenet, base)
    return variants


VARIANTS = _variants()


def _reading(readings: Sequence[str], settings: dict[str, str], default: str) -> str:
    """Returns the setting of the one reading that is among the known ones."""
    chosen = [reading for reading in readings if reading in settings]
    if len(chosen) > 1:
        raise ValueError(f"'{chosen[0]}' and '{chosen[1]}' are readings of the same; take one.")
    return settings[chosen[0]] if chosen else default


def _image_shape(config: ConfigDict) -> tuple[int, int, int]:
    """Returns the shape of an image as the network sees it."""
    height, width, channels = config.data.shape
    side = config.data.crop
    return (side, side, channels) if side else (height, width, channels)


def get_config(variant: str = "cnn") -> ConfigDict:
    """Returns the config of a SIRe network or of its bare backbone.

    Args:
        variant: See above.

    Returns:
        The config.

    Raises:
        ValueError: If there is no such variant or reading.
    """
    name, *readings = variant.split(",")
    for reading in readings:
        known = {**_ENDS, **_INITIAL, **dict.fromkeys((*_OTHERS, _FEW_IMAGES))}
        registry.choose(known, reading, "reading")
    last = _reading(readings, _ENDS, "normalized")
    network, imagenet, base = configuration.variant(VARIANTS, name)
    settings, stages, weight = _NETWORKS[network]
    if _FEW_IMAGES in readings and network != "cnn":
        raise ValueError(f"'{_FEW_IMAGES}' is for cnn, not for {network}.")
    if {_FEW_IMAGES, "summed"} <= {*readings}:
        raise ValueError(f"'{_FEW_IMAGES}' and 'summed' don't go together: lambda is of 32 x 32.")
    classes = 1000 if imagenet else 100

    config = configuration.default()
    config.name = f"sire/{variant}"
    config.data.task = configuration.task("images", validation_per_class=50)
    if imagenet:
        configuration.stream(config)
        config.data.update(name="tfds:imagenet2012", images=1_281_167)
        config.data.test_split = "validation"  # those of "test" have no labels
        config.data.classes = ConfigDict({"label": classes})
    else:
        config.data.update(name="tfds:cifar100", shape=(32, 32, 3), images=50_000)
        config.data.classes = ConfigDict({"label": classes, "coarse_label": 20})
    config.augmentation.flip = augmentation("flip")

    stem = {"stem": "imagenet" if imagenet else "cifar"}
    has_stem = settings["name"] in ("resnet", "googlenet")
    config.backbone = backbone(classes=classes, **settings, **(stem if has_stem else {}))
    if base and "residuals" in config.backbone:
        config.backbone.residuals = False
    share = 1 / classes if "equation_1" in readings else 1.0
    config.objectives.main = objective("main", "label", "cross_entropy", share)
    if "no_decoder_norm" in readings:
        if "decoder_norm" not in config.backbone:
            raise ValueError(f"'no_decoder_norm' is a reading of cnn and vgg, not of {network}.")
        config.backbone.decoder_norm = False
    chosen = () if base else tuple(range(1, stages + 1))
    config.heads.decoder = head("decoders", stages=chosen, last=last)
    values = math.prod(_image_shape(config)) if "summed" in readings else 1
    config.objectives.decoder = objective("decoder", "image", "mean_squared_error", values * weight)
    if network == "googlenet":
        for i, endpoint in enumerate(("stage_4_block_1", "stage_4_block_4"), start=1):
            config.heads[f"auxiliary_{i}"] = head(
                "convolutional_classifier", endpoints=(endpoint,), classes=classes
            )
            config.objectives[f"auxiliary_{i}"] = objective(
                f"auxiliary_{i}", "label", "cross_entropy", share * _AUXILIARY_WEIGHT
            )

    # Section 4.1, after DeVries and Taylor (2017), whose batch size it is.
    config.epochs = 200
    config.batch_size = 128
    rate = {
        "name": "piecewise",
        "init_value": 0.1,
        "scale": 0.2,
        # At epochs 60, 120 and 160 of 200, and as early in a shorter run.
        "boundaries": (0.3, 0.6, 0.8),
        "unit": "run",
    }
    nesterov = "heavy_ball" not in readings
    config.optimizer = optimizer(
        "sgd", learning_rate=rate, momentum=0.9, nesterov=nesterov, weight_decay=5e-4
    )
    # The authors' own network is one of PyTorch's layers; others have initial values of their own.
    own = "pytorch" if network == "cnn" else "modules"
    config.initialization = _reading(readings, _INITIAL, own)
    # Vectorized over seeds, convolutions become grouped ones, which are slow on accelerators, too.
    config.seeds_at_once = 1
    config.evaluate_splits = ("validation",)
    config.evaluate_batch_size = 500
    if _FEW_IMAGES in readings:
        configuration.few_images(config)
        config.batch_size = 32
        config.backbone.update(width=0.25, hidden=(128, 128), dropout=0.0)
    return config
