"""SSAL: branches over groups of the labels.

S. Palacio, P. Engler, J. Hees and A. Dengel, *Contextual Classification Using Self-Supervised
Auxiliary Models for Deep Neural Networks*.

``configs/ssal.py:resnet50`` and so on; options behind commas, ``configs/ssal.py:resnet18,1``:

    resnet18             ResNet18, two branches (Tables 1 and 2, Fig. 2); position 1 is after its
                         first stage of residual blocks, the endpoint "stage_2"
    resnet50             ResNet50, three branches (Tables 1 and 3, Fig. 3)
    wrn28_10             WRN-28-10, three (Tables 1 and 3, Fig. 3)
    se_wrn16_8           SE-WRN-16-8, three (Table 3)
    densenet190_40       DenseNet-BC-190-40, three (Tables 3 and 5)
    densenet100_12       DenseNet-BC-100-12, one (Fig. 3)
    imagenet_resnet50    ResNet50 of ImageNet, three (Tables 4 and 5)
    wide_resnet18, deep_resnet18, dw_resnet18    larger networks without branches (Table 2)

    0, 1, 2, 3           so many branches; 0 is the bare network
    split                groups of labels that are confused little rather than much
    validate             an eta fitted to the images held out, and the best weights on them taken
    all_images           nothing held out: the linear combination is fitted to training images
    small                a quarter of all widths, of the branches, too: for a first look
    few_images           what two cores can carry: small, 16 x 16 pixels, 2,000 training images, 40
                         epochs (``configuration.few_images``); CIFAR-100 alone
    tiny                 ResNet18 on Tiny-ImageNet, 20 epochs, the branches of Table 2: 1 or 3
    groups_30            30 groups in place of 33, as the text to Table 1 has them
    sweep                one branch as those of Fig. 2 (ResNet18, and on Tiny-ImageNet) and Fig. 3,
                         over 20 groups
    gap_cat, cat_fc      the branches without their objective: their outputs and the mean features
                         (GapCatNoSSAL), or their outputs and the main one's (CatFCNoSSAL), are
                         classified together, as the output "combined", which alone is trained
    cat_fc_ssal          the same as cat_fc, with the branches' objectives (Fig. 5)

What is measured: ``main`` (+TR in the paper), ``joint`` (+JP), ``joint_eta_1``, ``joint_softmax``
(normalized as the paper prints it) and ``linear`` (+LC). The linear combination is fitted to 50
training images of each class that are held out of all networks alike: an output is surer of images
that it was trained on than it will be of others. The paper, which doesn't say to what it fits,
trains on all (``all_images``).

Groups are read from files, ``configs/groups/cifar100_join.json`` and so on. CIFAR-100's come with
the configs, of 2, 4, 10, 20, 30, 33 and 50 groups (``configs/groups/README.md``). Those of the
other sets are made by ``sire_jax.grouping`` as ``tiny_imagenet_join.json`` and
``imagenet_join.json`` in the same directory; or name a file for each branch,
``--config.data.groups.groups_1.file=FILE``. Of use: ``--config.heads.branch_1.position=3``,
``--config.predictions.joint.eta=0.5``, ``--config.optimizer.weight_decay=1e-4`` (of the WRNs
``….weight_decay.heads=1e-4``), ``--config.epochs=10`` (a shorter run).

Tiny-ImageNet is the folder ``tiny-imagenet-200`` as it is distributed, in
``--config.data.dir=DIR``; it fits in memory, and can be streamed, too:
``--config.data.feed=stream``. ImageNet is streamed.

Neither paper nor release says, and this file decides: the weights, weight decay and learning rate
of ResNet18 and of the SE-WRN (those of ResNet50 and of the WRN); weight decay of ResNets and
DenseNets, 5e-4; the peak of the learning rate at 40% of the run (told of Table 2 alone); where the
branches of the WRN are (the printed sizes fit positions 3, 4 and 5) and which the SE-WRN has (the
printed size fits 5 x 5, 3 x 3 and 5 x 5 kernels first); all of ImageNet but the groups' numbers;
the rates and groups on Tiny-ImageNet; the weights of the DenseNets' branches; that of the loss of a
branch that is alone, the first of several; of Fig. 3 the weight of the branch (the first of
several) and its layers (the released ones of a position in the middle). The paper's branches of
Fig. 3 have more channels in their first layer the deeper they are, it doesn't say how many; here
they have 128 at all positions. Section 4.2 has the branch
"after the first max-pooling, and before the first residual block": a network of small images has
no such pooling, and its branch is behind the stem, ``stage_1``.

The paper contradicts itself, and this file decides: groups are 20, 30 and 50 in the text of
Section 4.2, to Table 1, and 20, 33 and 50 in that to Table 3 and in the release. Here they are 33;
30 are the option ``groups_30``. Table 1's last row of ResNet50 repeats the WRN's; Table 3's size of
the WRN is that of one branch.
"""

from typing import Any

from ml_collections import ConfigDict

from sire_jax import configuration
from sire_jax.configuration import (
    augmentation,
    backbone,
    grouping,
    head,
    loss,
    objective,
    optimizer,
    prediction,
)
from sire_jax.text import listed

# A branch: position, number of groups, layers (``heads.branch.RELEASED``).
Branch = tuple[int | str, int, str]
_TABLE_2: tuple[Branch, ...] = (
    ("stage_1", 20, "table_2"),
    ("stage_2", 33, "table_2"),
    ("stage_3", 50, "table_2"),
)

_RESNET_RECIPE: dict[str, Any] = {
    "epochs": 80,
    "batch_size": 64,
    "learning_rate": 0.092,
    "momentum": 0.93,
    "weight_decay": 5e-4,
    "weights": (0.42, 0.59, 0.76),
    "eta": 0.3,
}
_WIDE_RECIPE: dict[str, Any] = {
    "epochs": 80,
    "batch_size": 64,
    "learning_rate": 0.021,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": {"backbone": 7e-4, "heads": 3e-4},
    "weights": (0.8, 0.9, 1.0),
    "eta": 0.4,
    "standardized": True,
}
_DENSE_RECIPE: dict[str, Any] = {
    **_RESNET_RECIPE,
    "epochs": 100,
    "batch_size": 32,
    "learning_rate": 0.08,
    "eta": 0.5,
    "smoothing": 0.1,
}
_RESNET_BRANCHES = ((1, 20, "resnet_1"), (2, 33, "resnet_2"), (3, 50, "resnet_3"))

# For each network its backbone, its branches, and how it is trained.
_NETWORKS: dict[str, tuple[dict[str, Any], tuple[Branch, ...], dict[str, Any]]] = {
    "resnet18": (
        {"name": "resnet", "depth": 18},
        ((1, 20, "resnet_2"), (2, 50, "resnet_2")),
        {**_RESNET_RECIPE, "eta": 1.0},
    ),
    "wide_resnet18": ({"name": "resnet", "depth": 18, "width": 1.5}, (), _RESNET_RECIPE),
    "deep_resnet18": ({"name": "resnet", "depth": 18, "extra": (256,) * 4}, (), _RESNET_RECIPE),
    "dw_resnet18": ({"name": "resnet", "depth": 18, "extra": (512,) * 4}, (), _RESNET_RECIPE),
    "resnet50": ({"name": "resnet", "depth": 50}, _RESNET_BRANCHES, _RESNET_RECIPE),
    "wrn28_10": (
        {"name": "wide_resnet", "depth": 28, "width": 10.0},
        ((3, 20, "wide_1"), (4, 33, "wide_2"), (5, 50, "wide_3")),
        _WIDE_RECIPE,
    ),
    "se_wrn16_8": (
        {"name": "wide_resnet", "depth": 16, "width": 8.0, "squeeze": 16},
        ((3, 20, "resnet_1"), (5, 33, "resnet_3"), (7, 50, "resnet_2")),
        _WIDE_RECIPE,
    ),
    "densenet190_40": (
        {"name": "densenet", "depth": 190, "growth": 40},
        ((3, 20, "wide_1"), (5, 33, "wide_2"), (7, 50, "wide_3")),
        _DENSE_RECIPE,
    ),
    "densenet100_12": (
        {"name": "densenet", "depth": 100, "growth": 12},
        ((5, 20, "resnet_2"),),
        _DENSE_RECIPE,
    ),
    "imagenet_resnet50": (
        {"name": "resnet", "depth": 50, "stem": "imagenet"},
        ((1, 200, "resnet_1"), (2, 334, "resnet_2"), (3, 500, "resnet_3")),
        {**_RESNET_RECIPE, "epochs": 90, "batch_size": 256, "learning_rate": 0.1, "momentum": 0.9},
    ),
}
# Where Fig. 2 and Fig. 3 have their one branch, at first; its layers.
_SWEEPS: dict[str, Branch] = {
    "resnet18": _TABLE_2[0],
    "resnet50": (1, 20, "resnet_2"),
    "wrn28_10": (1, 20, "resnet_2"),
    "densenet100_12": (1, 20, "resnet_2"),
}
# The one branch of Tables 1 and 2 is not always the first of several; on Tiny-ImageNet or not.
_ALONE: dict[tuple[str, bool], Branch] = {
    ("wrn28_10", False): (5, 20, "wide_3"),
    ("resnet18", True): ("stage_2", 20, "table_2"),
}
_OF_RESNET18 = ("resnet18", "wide_resnet18", "deep_resnet18", "dw_resnet18")
# Those with a branch over 33 groups, which may be 30.
_OF_TABLE_1 = ("resnet50", "wrn28_10")
_NUMBERS = ("0", "1", "2", "3")
_COMBINED = ("gap_cat", "cat_fc", "cat_fc_ssal")
_KINDS = ("split", "validate", "all_images", "small", "few_images", "tiny", "groups_30", "sweep")
_OPTIONS = (*_NUMBERS, *_KINDS, *_COMBINED)

VARIANTS = (
    *_NETWORKS,
    "resnet18,0",
    "resnet18,1,validate",
    "resnet50,0",
    "resnet50,sweep",
    "resnet50,groups_30",
    "wrn28_10,1",
    "resnet18,sweep,split",
    "resnet18,sweep,tiny",
    "resnet18,tiny,0",
    "resnet18,tiny,1",
    "resnet18,tiny,3,gap_cat",
    "resnet18,1,cat_fc",
    "resnet18,1,cat_fc_ssal",
)


def get_config(variant: str = "resnet18") -> ConfigDict:
    """Returns the config of an SSAL network or of one that it is compared with.

    Args:
        variant: See above.

    Returns:
        The config.

    Raises:
        ValueError: If there is no such network or option, or they don't go together.
    """
    name, *options = variant.split(",")
    for option in options:
        configuration.variant(dict.fromkeys(_OPTIONS), option)
    parts, _, recipe = configuration.variant(_NETWORKS, name)
    if "tiny" in options and name not in _OF_RESNET18:
        raise ValueError(f"The option 'tiny' is for ResNet18, not for '{name}' (Table 2).")
    _check(options)
    if "few_images" in options and ("tiny" in options or name == "imagenet_resnet50"):
        raise ValueError("The option 'few_images' is for CIFAR-100.")
    if "tiny" in options:
        recipe = {**recipe, "epochs": 20, "eta": 0.3}
    branches = _branches(name, options)

    config = configuration.default()
    config.name = f"ssal/{variant}"
    classes = _data(config, name, options, recipe)
    scale = 0.25 if {"small", "few_images"} & {*options} else 1.0
    config.backbone = backbone(classes=classes, **_scaled(parts, scale))
    combined = next((option for option in options if option in _COMBINED), None)
    groups = _group_file(name, options)
    smoothing = recipe.get("smoothing")
    kind = loss("smoothed_cross_entropy", smoothing=smoothing) if smoothing else "cross_entropy"
    if combined is None:
        config.objectives.main = objective("main", "label", kind)
    for i, (position, number, layers) in enumerate(branches, start=1):
        place = {"position": str(position), "classes": number}
        branch = head("branch", **place, layers=layers, width=scale)
        config.heads[f"branch_{i}"] = branch
        if combined in (None, "cat_fc_ssal"):
            config.data.groups[f"groups_{i}"] = grouping(groups, number)
            config.objectives[f"branch_{i}"] = objective(
                f"branch_{i}", f"groups_{i}", kind, recipe["weights"][i - 1]
            )
    if combined is not None:
        _combine(config, combined, classes, kind, scale)
    if combined is None and branches:
        # A branch alone is not weighted down.
        _predict(config, recipe["eta"] if len(branches) > 1 else 1.0, options)
    _train(config, recipe)
    if "few_images" in options:
        configuration.few_images(config)
    return config


def _scaled(parts: dict[str, Any], scale: float) -> dict[str, Any]:
    """Multiplies the widths of a backbone, in whole numbers where it takes only those."""
    if scale == 1:
        return parts
    if parts["name"] == "densenet":
        return {**parts, "growth": int(scale * parts["growth"])}
    if "extra" in parts:
        parts = {**parts, "extra": tuple(int(scale * width) for width in parts["extra"])}
    return {**parts, "width": scale * parts.get("width", 1.0)}


def _check(options: list[str]) -> None:
    """Checks that options go together."""
    few = [(other, "few_images") for other in ("validate", "all_images", "small")]
    for exclusive in ((*_NUMBERS, "sweep"), _COMBINED, ("validate", "all_images"), *few):
        chosen = [option for option in options if option in exclusive]
        if len(chosen) > 1:
            raise ValueError(f"The options {', '.join(chosen)} exclude each other; choose one.")
    if "split" in options and "0" in options:
        raise ValueError("The option 'split' needs branches; leave the number 0 out.")


def _branches(name: str, options: list[str]) -> tuple[Branch, ...]:
    """Picks the branches."""
    numbers = [int(option) for option in options if option in _NUMBERS]
    if "groups_30" in options and (name not in _OF_TABLE_1 or {"sweep", "tiny"} & {*options}):
        raise ValueError(
            f"The option 'groups_30' is for the networks of Table 1, {listed(_OF_TABLE_1)}, on"
            " CIFAR-100."
        )
    if "sweep" in options:
        return (configuration.variant(_SWEEPS, name),)
    tiny = "tiny" in options
    branches = _TABLE_2 if tiny and name == "resnet18" else _NETWORKS[name][1]
    number = numbers[0] if numbers else len(branches)
    if number > len(branches):
        raise ValueError(f"'{name}' has {len(branches)} branches, not {number}.")
    alone = _ALONE.get((name, tiny)) if number == 1 else None
    chosen = (alone,) if alone else branches[:number]
    if "groups_30" not in options:
        return chosen
    if all(groups != 33 for _, groups, _ in chosen):
        fit = [i for i, (_, groups, _) in enumerate(branches, start=1) if groups == 33]
        hint = f"take {fit[0]} branches" if fit else f"'{name}' has none"
        raise ValueError(f"The option 'groups_30' needs a branch over 33 groups; {hint}.")
    return tuple((at, 30 if groups == 33 else groups, layers) for at, groups, layers in chosen)


def _data(config: ConfigDict, name: str, options: list[str], recipe: dict[str, Any]) -> int:
    """Sets data and augmentation; returns the number of classes."""
    config.augmentation.flip = augmentation("flip")
    config.evaluate_splits = ("test",)
    if "all_images" not in options:
        config.data.task.validation_per_class = 50
    if "validate" in options:
        config.evaluate_splits = ("validation", "test")
    if name == "imagenet_resnet50":
        configuration.stream(config)
        config.data.update(name="tfds:imagenet2012", images=1_281_167)
        config.data.test_split = "validation"
        config.data.classes = ConfigDict({"label": 1000})
        config.data.mean, config.data.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        return 1000
    config.augmentation.crop = augmentation("crop", padding=5, border="reflection")
    if "tiny" in options:
        config.data.update(name="folder:tiny-imagenet-200", shape=(64, 64, 3), images=100_000)
        config.data.test_split = "val"
        config.data.classes = ConfigDict({"label": 200})
        return 200
    config.data.update(name="tfds:cifar100", shape=(32, 32, 3), images=50_000)
    config.data.classes = ConfigDict({"label": 100, "coarse_label": 20})
    if recipe.get("standardized"):
        config.data.mean = (0.5071, 0.4867, 0.4408)
        config.data.std = (0.2675, 0.2565, 0.2761)
    return 100


def _group_file(name: str, options: list[str]) -> str:
    """Names the file of groups, here or shipped; only CIFAR-100's is."""
    data = "tiny_imagenet" if "tiny" in options else "cifar100"
    data = "imagenet" if name == "imagenet_resnet50" else data
    criterion = "split" if "split" in options else "join"
    return f"configs/groups/{data}_{criterion}.json"


def _combine(config: ConfigDict, combined: str, classes: int, kind: Any, scale: float) -> None:
    """Adds the output that classifies others together."""
    if not config.heads:
        raise ValueError(f"The option '{combined}' needs branches; leave the number 0 out.")
    start, hidden = ("pooled", ()) if combined == "gap_cat" else ("main", (int(2048 * scale),))
    config.heads.combined = head(
        "combination", endpoints=(start, *config.heads), classes=classes, hidden=hidden
    )
    config.objectives.combined = objective("combined", "label", kind)


def _predict(config: ConfigDict, eta: float, options: list[str]) -> None:
    """Adds the prediction rules; all are measured in one pass."""
    config.predictions.joint = prediction("joint_probability", eta=eta)
    config.predictions.joint_eta_1 = prediction("joint_probability", eta=1.0)
    config.predictions.joint_softmax = prediction(
        "joint_probability", eta=eta, normalization="softmax"
    )
    split = "train" if "all_images" in options else "validation"
    config.predictions.linear = prediction("linear_combination", split=split)
    if "validate" in options:
        config.predictions.joint_fitted = prediction("fitted_joint_probability")


def _train(config: ConfigDict, recipe: dict[str, Any]) -> None:
    """Sets epochs, batches and the optimizer."""
    rate = {
        "name": "triangular",
        "peak_value": recipe["learning_rate"],
        "peak": 0.4,
        "end": 1.0,
        "unit": "run",
    }
    config.epochs, config.batch_size = recipe["epochs"], recipe["batch_size"]
    config.optimizer = optimizer(
        "sgd",
        learning_rate=rate,
        momentum=recipe["momentum"],
        nesterov=recipe.get("nesterov", False),
        weight_decay=recipe["weight_decay"],
    )
    # Vectorized over seeds, convolutions become grouped ones, which are slow on accelerators, too.
    config.seeds_at_once = 1
    config.evaluate_batch_size = 250
