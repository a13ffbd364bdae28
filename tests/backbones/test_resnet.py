"""ResNets: positions for branches, wider ones and ones with further convolutions."""

import jax
import pytest
from planned import shape, shapes_of

from sire_jax import traced
from sire_jax.backbones import resnet
from sire_jax.backbones.blocks import Convolution, MaxPool, Residual
from sire_jax.heads.decoder import decoders
from sire_jax.networks import Network


@pytest.mark.parametrize("depth", [18, 50])
def test_positions_of_a_resnet_are_behind_its_residual_stages(depth):
    network = resnet(100, depth)
    assert network.plan.positions == ("stage_2", "stage_3", "stage_4", "stage_5")
    image = shape(2, 32, 32, 3)
    variables = shapes_of(network, image)
    assert traced.size(variables["params"]) == {18: 11_220_132, 50: 23_705_252}[depth]
    _, found = jax.eval_shape(network.apply, variables, image)
    multiple = 4 if depth == 50 else 1
    expected = [
        (2, side, side, multiple * width) for side, width in [(32, 64), (16, 128), (8, 256)]
    ]
    shapes = [found[name].shape for name in network.plan.positions]
    assert shapes == [*expected, (2, 4, 4, multiple * 512)]
    assert found["pooled"].shape == (2, multiple * 512)


def conv(kernel, inputs, outputs):
    """Counts a convolution without bias, and batch norm."""
    return kernel * kernel * inputs * outputs + 2 * outputs


def count(classes, kernel, widths=(64, 128, 256, 512), extra=()):
    """Counts the parameters of a ResNet-18, two blocks a stage; ``extra`` behind the stem."""
    total, inputs = conv(kernel, 3, widths[0]), widths[0]
    for width in extra:
        total, inputs = total + conv(3, inputs, width), width
    for stage, width in enumerate(widths):
        total += conv(3, inputs, width) + 3 * conv(3, width, width)
        total += conv(1, inputs, width) if stage or inputs != width else 0
        inputs = width
    return total + (inputs + 1) * classes


# Palacio et al., Tables 1 and 2, print 11.23, 11.2, 25.3, 13.3 and 19.0 M: Keras also counts biases
# of convolutions and the averages of batch norm, 11.234, 11.286, 25.297, 13.335 and 18.960 M.
@pytest.mark.parametrize(
    ("settings", "widths", "known"),
    [
        ({"classes": 100}, (64, 128, 256, 512), 11_220_132),
        ({"classes": 200}, (64, 128, 256, 512), 11_271_432),
        ({"classes": 200, "width": 1.5}, (96, 192, 384, 768), 25_275_176),
        ({"classes": 200, "extra": (256,) * 4}, (64, 128, 256, 512), 13_317_512),
        ({"classes": 200, "extra": (512,) * 4}, (64, 128, 256, 512), 18_939_272),
        ({"classes": 1000, "stem": "imagenet"}, (64, 128, 256, 512), 11_689_512),
    ],
    ids=str,
)
def test_parameters_of_resnet_18_and_its_larger_kin(settings, widths, known):
    network = resnet(depth=18, **settings)
    params = shapes_of(network, shape(2, 32, 32, 3))["params"]
    kernel = 7 if settings.get("stem") == "imagenet" else 3
    expected = count(settings["classes"], kernel, widths, settings.get("extra", ()))
    assert traced.size(params) == expected == known


def test_further_convolutions_follow_the_stem_and_its_pool():
    network = resnet(2, extra=(8, 9))
    cifar, imagenet = network.plan, resnet(2, stem="imagenet", extra=(8, 9)).plan
    assert cifar.stages[1][:2] == imagenet.stages[1][1:3] == (Convolution(8), Convolution(9))
    assert isinstance(imagenet.stages[1][0], MaxPool)
    assert cifar.stages[1][2:] == imagenet.stages[1][3:] == (Residual((64, 64)),) * 3
    # Decoders mirror them.
    decoding = Network(network, {"d": decoders(cifar, (2,))["2"]})
    image = shape(2, 8, 8, 3)
    outputs = jax.eval_shape(decoding.apply, shapes_of(decoding, image), image)
    assert outputs["d"].shape == image.shape
