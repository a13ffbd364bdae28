"""AuxNet: Guo et al., *The Shallow End: Empowering Shallower Deep-Convolutional Networks*.

``configs/auxnet.py:56-5`` is AuxNet-56-5 on CIFAR-10, with multi-way backpropagation. A variant is
a network and any of these options, ``56-5,cifar100,joint``:

    networks   20-2 32-2 44-2 44-3 56-2 56-5 56-10 26-2/2 56-2/2 56-5/2 26-2/10 56-3 (depth-outputs,
               /N times as wide); 34-2 50-2 50-4 101-2 (ImageNet);
               resnet-20 32 44 56 110 1001 26/10 34 50 101: the trunk alone
    data       cifar10 (default), cifar100, svhn, imagenet, imagenet100
    rule       multiway (default), pairwise, joint, effective_joint
    dropout    dropout inside blocks, as in the rows of Table 3 marked with a dagger
    probes     exits that learn from the features without changing them, trained jointly: how well
               each depth of the bare trunk can be classified (Table 6)
    few_images what two cores can carry, with cifar100: 16 x 16 pixels, 2,000 training images, 40
               epochs, and its 20 coarse labels (``configuration.few_images``)

Of use: ``--config.heads.exit.layers="(15, 35)"``, ``--config.objectives.exit.weight.nu=1`` (Table
9), ``--config.backbone.shortcut_scale=0.5`` (Table 10), ``--config.aggregator.name=upgrad``,
``--config.weighting.name=uncertainty``, ``--config.data.task.validation_per_class=50`` (for early
exits, which need validation data; the paper holds none out),
``--config.backbone.width=0.5 --config.epochs=10`` (a smaller network, a shorter run),
``--config.evaluate_splits="('train','test')"`` (training errors in the curves, too, as in Figs. 2b,
3 and 4).

The paper does not say, and this file decides: the dropout rate, 0.3; the ImageNet trunks, which are
those of He et al. (2016) with activation after the shortcut, so that exits have no batch norm of
their own; the step of joint backpropagation, divided as below Eq. 4; the mean and deviation that
images are normalized with (of SVHN none); the learning rate's drops at 40% and 60% on ImageNet.
Otherwise than the paper, which has 128 of all networks, batches of ImageNet have 256 images, as
those of He et al. (2016).

ImageNet is streamed: training sees random parts of random scales, without changes of colour;
evaluation averages ten crops of 224 pixels, of the central 256 x 256. It may also be image folders:
``--config.data.name=folder:imagenet --config.data.dir=DIR --config.data.test_split=val``. A draw of
100 classes has about 128,000 images; a run says what ``--config.data.images`` should be.
"""

from typing import Any

from ml_collections import ConfigDict

from sire_jax import configuration
from sire_jax.configuration import augmentation, backbone, head, objective, optimizer

# Depth, width, and the layers of the auxiliary outputs (Tables 1 to 8).
_NETWORKS: dict[str, tuple[int, float, tuple[int, ...]]] = {
    "20-2": (20, 1, (17,)),
    "26-2/2": (26, 2, (19,)),
    "26-2/10": (26, 10, (19,)),
    "32-2": (32, 1, (25,)),
    "44-2": (44, 1, (35,)),
    "44-3": (44, 1, (25, 35)),
    "56-2": (56, 1, (45,)),
    "56-2/2": (56, 2, (45,)),
    "56-3": (56, 1, (35, 45)),
    "56-5": (56, 1, (15, 25, 35, 45)),
    "56-5/2": (56, 2, (15, 25, 35, 45)),
    "56-10": (56, 1, (13, 17, 21, 25, 29, 33, 37, 41, 45)),
    **{f"resnet-{depth}": (depth, 1, ()) for depth in (20, 32, 44, 56, 110, 1001)},
    "resnet-26/10": (26, 10, ()),
}
_IMAGENET: dict[str, tuple[int, tuple[int, ...]]] = {
    "34-2": (34, (29,)),
    "50-2": (50, (40,)),
    "50-4": (50, (22, 31, 40)),
    "101-2": (101, (88,)),
    **{f"resnet-{depth}": (depth, ()) for depth in (34, 50, 101)},
}
# Images of the training set, classes, epochs, and the first learning rate.
_DATA: dict[str, dict[str, Any]] = {
    "cifar10": {"name": "tfds:cifar10", "images": 50_000, "classes": 10},
    "cifar100": {"name": "tfds:cifar100", "images": 50_000, "classes": 100},
    "svhn": {"name": "tfds:svhn_cropped", "images": 604_388, "classes": 10},
    "imagenet": {"name": "tfds:imagenet2012", "images": 1_281_167, "classes": 1000},
    # About 1,280 of each class drawn; a run says what the number is if it is another.
    "imagenet100": {"name": "tfds:imagenet2012", "images": 128_000, "classes": 100},
}
_EPOCHS = {"cifar10": 400, "cifar100": 400, "svhn": 200, "imagenet": 90, "imagenet100": 90}
_RULES = ("multiway", "pairwise", "joint", "effective_joint")
# Mean and standard deviation of the channels, of pixels in [0, 1], as in the authors' code base
# (fb.resnet.torch); SVHN is only divided by 255 (Section 4.1).
_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "imagenet100": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_OPTIONS = (*_DATA, *_RULES, "dropout", "probes", "few_images")
_DROPOUT = 0.3

VARIANTS = (
    *_NETWORKS,
    *(f"{name},imagenet" for name in _IMAGENET),
    *(f"{name},imagenet100" for name in _IMAGENET),
)


def get_config(variant: str = "56-5") -> ConfigDict:
    """Returns the config of an AuxNet or of its trunk.

    Args:
        variant: See above.

    Returns:
        The config.

    Raises:
        ValueError: If there is no such network or option.
    """
    name, *options = variant.split(",")
    for option in options:
        configuration.variant(dict.fromkeys(_OPTIONS), option)
    only_imagenet = name in _IMAGENET and name not in _NETWORKS
    data = _one_of(options, tuple(_DATA), "imagenet" if only_imagenet else "cifar10")
    rule = _one_of(options, _RULES, "multiway")
    if "dropout" in options and data.startswith("imagenet"):
        raise ValueError("The option 'dropout' is for trunks of small images, not for ImageNet's.")

    few = "few_images" in options
    if few and data != "cifar100":
        raise ValueError(f"The option 'few_images' is for cifar100, not for {data}.")
    target = "coarse_label" if few else "label"

    config = configuration.default()
    config.name = f"auxnet/{variant}"
    if data.startswith("imagenet"):
        layers, normalize = _imagenet(config, name, data)
    else:
        layers, normalize = _small_images(config, name, data, "dropout" in options)

    if data in _STATISTICS:
        config.data.mean, config.data.std = _STATISTICS[data]
    if few:
        config.backbone.classes = config.data.classes[target]
    config.objectives.main = objective("main", target, "cross_entropy")
    if "probes" in options and not layers:
        raise ValueError(f"'{name}' has no exits to make probes of; take 56-5, for instance.")
    if layers:
        config.heads.exit = head(
            "exits",
            layers=layers,
            classes=config.backbone.classes,
            normalize=normalize,
            detached="probes" in options,
        )
        weight = 1.0 if "probes" in options else {"name": "depth", "nu": 2.0}
        config.objectives.exit = objective("exit", target, "cross_entropy", weight)
    alone = not layers or "probes" in options
    chosen = [option for option in options if option in _RULES]
    if alone and chosen:
        raise ValueError(
            f"The option '{chosen[0]}' would do nothing: a network without auxiliary outputs, or"
            " with probes alone, is trained by its own loss."
        )
    # Every rule takes `adjust`, so that another one can be chosen by an override.
    config.update_rule = ConfigDict({"name": "joint" if alone else rule, "adjust": not alone})

    config.epochs = _EPOCHS[data]
    imagenet = data.startswith("imagenet")
    config.batch_size = 256 if imagenet else 128
    rate = {
        "name": "piecewise",
        # Halved for the AuxNets alone (Section 4.1, ImageNet-1000).
        "init_value": 0.05 if imagenet and layers else 0.1,
        "scale": 0.1,
        "boundaries": (0.4, 0.6),
        "unit": "run",
    }
    config.optimizer = optimizer(
        "sgd", learning_rate=rate, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    # Vectorized over seeds, convolutions become grouped ones, which are slow on accelerators, too.
    config.seeds_at_once = 1
    config.evaluate_splits = ("test",)
    config.evaluate_batch_size = 50 if imagenet else 500
    if few:
        configuration.few_images(config)
    return config


def _one_of(options: list[str], exclusive: tuple[str, ...], default: str) -> str:
    chosen = [option for option in options if option in exclusive]
    if len(chosen) > 1:
        raise ValueError(f"The options {', '.join(chosen)} exclude each other; choose one.")
    return chosen[0] if chosen else default


def _small_images(
    config: ConfigDict, name: str, data: str, dropout: bool
) -> tuple[tuple[int, ...], bool]:
    """Sets data, augmentation and trunk for images of 32 x 32."""
    depth, width, layers = configuration.variant(_NETWORKS, name)
    about = _DATA[data]
    config.data.update(name=about["name"], shape=(32, 32, 3), images=about["images"])
    config.data.classes = ConfigDict({"label": about["classes"]})
    if data == "svhn":
        config.data.train_splits = ("train", "extra")
    else:
        config.augmentation.flip = augmentation("flip")
        config.augmentation.crop = augmentation("crop", padding=4)
    if data == "cifar100":
        config.data.classes.coarse_label = 20
    config.backbone = backbone(
        "preactivation_resnet",
        classes=about["classes"],
        depth=depth,
        width=float(width),
        bottleneck=depth > 200,
        dropout=_DROPOUT if dropout else 0.0,
    )
    return layers, True


def _imagenet(config: ConfigDict, name: str, data: str) -> tuple[tuple[int, ...], bool]:
    """Sets data, augmentation and trunk for ImageNet or 100 of its classes."""
    depth, layers = configuration.variant(_IMAGENET, name)
    about = _DATA[data]
    configuration.stream(config)
    config.data.update(name=about["name"], images=about["images"])
    config.data.update(test_split="validation", ten_crop=True)
    config.data.classes = ConfigDict({"label": about["classes"]})
    if data == "imagenet100":
        config.data.draw_classes = 100
    config.augmentation.flip = augmentation("flip")
    config.backbone = backbone("resnet", classes=about["classes"], depth=depth, stem="imagenet")
    return layers, False
