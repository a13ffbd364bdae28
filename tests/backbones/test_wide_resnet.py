"""Wide ResNets and squeeze-and-excitation: counts, values by hand, positions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from planned import apart, normal, random_like, shape, shapes_of

from sire_jax import registry, traced
from sire_jax.backbones import BACKBONES, wide_resnet
from sire_jax.backbones.plan import Plan, Planned
from sire_jax.backbones.preactivation import PreActivation
from sire_jax.layers import SqueezeExcitation

# ---- Counts that know nothing of the library.


def _count(depth, width, classes, squeeze=0):
    inputs = 16
    total = 9 * 3 * inputs
    for stage, base in enumerate((16, 32, 64)):
        outputs = base * width
        for block in range((depth - 4) // 6):
            total += 2 * inputs + 9 * inputs * outputs + 2 * outputs + 9 * outputs * outputs
            divides = stage > 0 and block == 0
            total += inputs * outputs if divides or inputs != outputs else 0
            total += 2 * outputs * (outputs // squeeze) if squeeze else 0
            inputs = outputs
    return total + 2 * inputs + (inputs + 1) * classes


# Zagoruyko and Komodakis, Table 4 (of 10 classes), and Palacio et al., Tables 1 and 3, where Keras
# also counts biases of convolutions and the averages of batch norm: 36.565 and 11.105 M. Millions.
@pytest.mark.parametrize(
    ("settings", "known", "printed"),
    [
        ({"depth": 10, "width": 1, "classes": 10}, None, None),
        ({"depth": 10, "width": 2, "classes": 5, "squeeze": 3}, None, None),
        ({"depth": 16, "width": 3, "classes": 10}, None, None),
        ({"depth": 40, "width": 1, "classes": 10}, None, 0.6),
        ({"depth": 40, "width": 4, "classes": 10}, None, 8.9),
        ({"depth": 16, "width": 8, "classes": 10}, None, 11.0),
        ({"depth": 16, "width": 8, "classes": 100, "squeeze": 16}, 11_093_556, 11.1),
        ({"classes": 10}, 36_479_194, 36.5),
        ({"classes": 100}, 36_536_884, 36.5),
    ],
    ids=str,
)
def test_parameters_of_every_depth_and_width(settings, known, printed):
    network = registry.create(BACKBONES, {"name": "wide_resnet", **settings}, "backbone")
    network = network.clone(endpoints=())
    size = traced.size(shapes_of(network, shape(2, 32, 32, 3))["params"])
    expected = _count(**{"depth": 28, "width": 10, **settings})
    assert size == expected == (known or expected)
    assert printed is None or size / 1e6 == pytest.approx(printed, abs=0.06)


# ---- Positions.


@pytest.mark.parametrize(
    ("depth", "middle"), [(10, None), (16, 1), (22, 1), (28, 2)], ids=["10", "16", "22", "28"]
)
def test_positions_are_behind_the_stem_and_in_the_middle_and_at_the_end_of_stages(depth, middle):
    network = wide_resnet(5, depth, 2.0)
    image = shape(2, 32, 32, 3)
    _, found = jax.eval_shape(network.apply, shapes_of(network, image), image)
    expected = [("stage_1", (2, 32, 32, 16))]
    for stage, (side, width) in enumerate(((32, 32), (16, 64), (8, 128)), start=2):
        middles = [f"stage_{stage}_block_{middle}"] if middle else []
        expected += [(name, (2, side, side, width)) for name in (*middles, f"stage_{stage}")]
    positions = network.plan.positions
    assert [(name, found[name].shape) for name in positions] == expected
    assert len(positions) == (7 if middle else 4)
    assert found["pooled"].shape == (2, 128)


# ---- Squeeze-and-excitation.


def _gates(z, reduce, expand):
    return 1 / (1 + np.exp(-np.maximum(z @ reduce, 0) @ expand))


def test_squeeze_and_excitation_by_hand():
    # One image, two pixels, channels (1, 3), (2, -2) and (0, 4): the means are 2, 0 and 2.
    x = jnp.asarray([[1.0, 2.0, 0.0], [3.0, -2.0, 4.0]]).reshape(1, 1, 2, 3)
    params = {
        "reduce": {"kernel": jnp.asarray([[1.0], [9.0], [-0.5]])},
        "expand": {"kernel": jnp.asarray([[0.0, np.log(3.0), -np.log(4.0)]], jnp.float32)},
    }
    # Reduced: 2 - 1 = 1. Expanded: 0, log 3, -log 4; their gates are 1/2, 3/4, 1/5.
    y = SqueezeExcitation(3).apply({"params": params}, x)
    expected = [[0.5, 1.5, 0.0], [1.5, -1.5, 0.8]]
    np.testing.assert_allclose(np.asarray(y)[0, 0], expected, rtol=1e-6)
    # With ReLU nothing is left of a negative sum: all gates are 1/2.
    negative = SqueezeExcitation(3).apply({"params": params}, -x)
    np.testing.assert_allclose(negative, -x / 2, rtol=1e-6)


@pytest.mark.parametrize(("channels", "reduction", "reduced"), [(8, 2, 4), (7, 3, 2), (5, 5, 1)])
def test_gates_are_those_of_the_whole_image(channels, reduction, reduced):
    x = normal(1, 3, 4, 2, channels)
    layer = SqueezeExcitation(reduction)
    variables = random_like(shapes_of(layer, x))
    kernels = [np.asarray(variables["params"][k]["kernel"]) for k in ("reduce", "expand")]
    assert [kernel.shape for kernel in kernels] == [(channels, reduced), (reduced, channels)]
    y = np.asarray(layer.apply(variables, x))
    expected = _gates(np.asarray(x).mean((1, 2)), *kernels)[:, None, None] * np.asarray(x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_gates_of_half_precision_are_computed_in_single_precision():
    x = normal(2, 2, 4, 4, 6).astype(jnp.bfloat16)
    layer = SqueezeExcitation(2)
    variables = random_like(shapes_of(layer, x))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    y = layer.apply(variables, x)
    assert y.dtype == jnp.bfloat16
    kernels = [np.asarray(variables["params"][k]["kernel"]) for k in ("reduce", "expand")]
    gates = _gates(np.asarray(x, np.float32).mean((1, 2)), *kernels)
    expected = x * jnp.asarray(gates, jnp.bfloat16)[:, None, None]
    # A gate between two numbers of half precision may be rounded to either.
    np.testing.assert_allclose(np.asarray(y, np.float32), np.asarray(expected, np.float32), 0.01)


def test_gradients_of_squeeze_and_excitation_equal_finite_differences():
    x = normal(3, 2, 2, 3, 4)
    layer = SqueezeExcitation(2)
    variables = random_like(shapes_of(layer, x), seed=3)
    apply = jax.jit(lambda params, x: layer.apply({"params": params}, x))
    check_grads(apply, (variables["params"], x), 1, modes=["rev"], atol=0.02, rtol=0.02, eps=0.01)


@pytest.mark.parametrize("train", [False, True])
def test_a_block_scales_its_residual_branch_alone(train):
    x = normal(4, 3, 4, 4, 2)
    plain = PreActivation((3, 4), stride=2, shortcut="B")
    squeezed = PreActivation((3, 4), stride=2, shortcut="B", squeeze=2)
    variables = random_like(shapes_of(squeezed, x, x, train=False))
    params = dict(variables["params"])
    squeeze = params.pop("squeeze")
    kernels = [np.asarray(squeeze[k]["kernel"]) for k in ("reduce", "expand")]

    @jax.jit
    def apply(variables, params):
        """Returns the block, it without squeezing, and only the shortcut of that."""
        branchless = {**params, "conv_2": {"kernel": jnp.zeros((3, 3, 3, 4))}}
        stats = variables["batch_stats"]
        each = [(squeezed, variables["params"]), (plain, params), (plain, branchless)]
        return [
            block.apply(
                {"params": p, "batch_stats": stats}, x, x, train=train, mutable=["batch_stats"]
            )[0]
            for block, p in each
        ]

    y, whole, shortcut = map(np.asarray, apply(variables, params))
    branch = whole - shortcut
    expected = shortcut + _gates(branch.mean((1, 2)), *kernels)[:, None, None] * branch
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_squeezed_blocks_in_a_loop_compute_what_they_do_one_by_one(monkeypatch):
    monkeypatch.setattr("sire_jax.backbones.plan.LONG", 2)
    image = normal(6, 2, 4, 4, 4)
    plan = Plan(((PreActivation((4, 4), squeeze=2),) * 3,))
    looped, one_by_one = (Planned(plan, 2, endpoints=endpoints) for endpoints in ((), None))
    variables = random_like(shapes_of(looped, image), seed=2)
    assert "squeeze" in variables["params"]["stage_1_block_1_to_3"]
    found = []
    for network, own in ((looped, variables), (one_by_one, apart(variables))):

        def loss(params, network=network, stats=own["batch_stats"]):
            given = {"params": params, "batch_stats": stats}
            (logits, _), new = network.apply(given, image, train=True, mutable=["batch_stats"])
            return (logits**2).sum(), (logits, apart(new))

        program = jax.make_jaxpr(loss)(own["params"])
        lengths = [e.params["length"] for e in program.eqns if e.primitive.name == "scan"]
        assert lengths == ([3] if network is looped else [])
        value, gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(own["params"])
        found.append((value, apart({"params": gradient})))
    chex.assert_trees_all_close(*found, rtol=1e-4, atol=1e-5)


def test_a_network_in_half_precision():
    network = wide_resnet(3, 10, 0.25, 2, dtype="bfloat16")
    image = shape(2, 8, 8, 3)
    variables = shapes_of(network, image)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, found = jax.eval_shape(network.apply, variables, image)
    assert (logits.dtype, found["stage_4"].dtype) == (jnp.float32, jnp.bfloat16)
    assert (logits.shape, found["stage_4"].shape) == ((2, 3), (2, 2, 2, 16))


# ---- What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wide_resnet(10, 27), r"no wide ResNet of depth 27; .* 6 n \+ 4, such as 28\."),
        (lambda: wide_resnet(10, 4), r"no wide ResNet of depth 4; .* such as 10\."),
        (lambda: wide_resnet(10, -2), r"no wide ResNet of depth -2; .* such as 10\."),
        (lambda: wide_resnet(10, width=0.0), r"width is 0\.0; it should be above 0"),
        (lambda: wide_resnet(0), r"classes has 0; it should be at least 1"),
        (lambda: wide_resnet(10, dtype="half"), r"dtype is 'half'"),
        (lambda: wide_resnet(10, squeeze=-1), r"squeeze is -1; it should be 0, for none, or at l"),
        (lambda: wide_resnet(10, 16, 8.0, 129), r"squeeze is 129; .* at most the block's 128 ch"),
        (lambda: SqueezeExcitation(0), r"SqueezeExcitation is 0; it should be at least 1"),
        (
            lambda: shapes_of(SqueezeExcitation(4), shape(1, 2, 2, 3)),
            r"can't reduce 3 channels 4 times; its reduction should be at most 3",
        ),
        (
            lambda: shapes_of(wide_resnet(2, 10, dropout=1.0), shape(2, 8, 8, 3)),
            r"dropout rate is 1\.0; it should be in \[0, 1\)",
        ),
    ],
)
def test_networks_and_layers_that_do_not_exist_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
