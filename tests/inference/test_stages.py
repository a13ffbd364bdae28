"""A network in stages: the parts together are the whole, on any program."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from planned import normal, random_like, shape, shapes_of, tiny

from sire_jax import traced
from sire_jax.backbones.blocks import Convolution, Residual
from sire_jax.backbones.plan import Plan, Planned
from sire_jax.heads import Classifier
from sire_jax.inference.stages import cut_out, split
from sire_jax.networks import Network


def _through(stages, params, images):
    """Applies all stages, one after another; returns their outputs and what crosses each cut."""
    rows, shared, outputs, crossing = (images,), (), {}, []
    for stage in stages:
        outputs[stage.output], rows, shared = jax.jit(stage.apply)(params, rows, shared)
        crossing.append(([each.shape for each in rows], [each.shape for each in shared]))
        assert [each.shape for each in rows] == [each.shape for each in stage.rows]
        assert [each.dtype for each in rows] == [each.dtype for each in stage.rows]
    return outputs, crossing


# ---- A network of this project.


def _network():
    heads = {
        "exit_2": Classifier(endpoints=("stage_2_block_1",), classes=4),
        "exit_1": Classifier(endpoints=("stage_1_block_1",), classes=4),
    }
    return Network(tiny(4), heads)


def test_the_stages_of_a_network_are_the_whole_network():
    network, images = _network(), normal(0, 6, 8, 8, 1)
    variables = random_like(shapes_of(network, images))
    names = ["main", "exit_1", "exit_2"]
    stages = split(network.apply, names, variables, shape(6, 8, 8, 1))
    assert [stage.output for stage in stages] == ["exit_1", "exit_2", "main"]
    # 3 x 3 convolutions of 1 to 3 channels at 8 x 8; 3 to 4, and 4 to 5 at 4 x 4; 5 to 6. Dense
    # layers: the exits', and 2 * 2 * 6 values to 8 and 8 to 4.
    first, second, third, fourth = 64 * 9 * 3, 64 * 9 * 3 * 4, 16 * 9 * 4 * 5, 16 * 9 * 5 * 6
    assert [stage.multiply_adds for stage in stages] == [
        first + 3 * 4,
        second + third + 5 * 4,
        fourth + 24 * 8 + 8 * 4,
    ]
    assert sum(stage.multiply_adds for stage in stages) == traced.multiply_adds(
        network.apply, variables, shape(1, 8, 8, 1)
    )
    outputs, crossing = _through(stages, variables, images)
    expected = jax.jit(network.apply)(variables, images)
    for name in names:
        np.testing.assert_allclose(outputs[name], expected[name], rtol=1e-5, atol=1e-6)
    # The features where the exits are attached, and what the second block of each stage adds to
    # them, the input of the stage; nothing of parameters.
    first, second = [(6, 8, 8, 1), (6, 8, 8, 3)], [(6, 4, 4, 4), (6, 4, 4, 5)]
    assert crossing == [(first, []), (second, []), ([], [])]


def test_rows_can_be_gathered_between_stages():
    network, images = _network(), normal(0, 6, 8, 8, 1)
    variables = random_like(shapes_of(network, images))
    first, last = split(network.apply, ["exit_1", "main"], variables, shape(6, 8, 8, 1))
    _, rows, shared = jax.jit(first.apply)(variables, (images,), ())
    chosen = np.array([4, 1, 1, 5, 0, 0])
    output, _, _ = jax.jit(last.apply)(variables, tuple(x[chosen] for x in rows), shared)
    expected = jax.jit(network.apply)(variables, images)["main"][chosen]
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_an_output_that_is_cut_out_is_the_whole_networks_bit_for_bit():
    # Without the care that is taken, this network's fused sums are rounded otherwise.
    plan = Plan(((Convolution(16),), (Residual((16, 16)), Residual((16, 16)))))
    heads = {f"exit_{i}": Classifier(endpoints=(f"stage_{i}",), classes=4) for i in (1, 2)}
    network, images = Network(Planned(plan, 4), heads), normal(0, 6, 8, 8, 1)
    variables = random_like(shapes_of(network, images))

    def compiled(function):
        # All that the compiler does outside of tests.
        return jax.jit(function, compiler_options={"xla_backend_optimization_level": 3})

    expected = compiled(network.apply)(variables, images)
    for name, each in expected.items():
        found, read_by_others = compiled(partial(cut_out, network.apply, name))(variables, images)
        np.testing.assert_array_equal(found, each)
        # The first exit's endpoint, and the mean of the second's, which is the main output's, too.
        shapes = {value.shape for value in read_by_others}
        assert shapes == ({(6, 8, 8, 16)} if name == "exit_1" else {(6, 8, 8, 16), (6, 16)})
        # Nothing else is computed.
        image = shape(1, 8, 8, 1)
        costs = [
            traced.multiply_adds(
                lambda v, x, n=name: cut_out(network.apply, n, v, x), variables, image
            ),
            traced.multiply_adds(lambda v, x, n=name: network.apply(v, x)[n], variables, image),
        ]
        assert costs[0] == costs[1]


def test_equations_are_merged_where_they_are_the_same():
    def function(params, x):
        # The same product. Two zeros that are equal and not the same: 1 / (x * -0) is negative.
        plus, minus = x * jnp.float32(0.0), x * jnp.float32(-0.0)
        return {"first": x @ params + 1 / plus, "last": x @ params + 1 / minus}

    params, images = jnp.eye(3), jnp.ones((5, 3))
    stages = split(function, ["first", "last"], params, shape(5, 3))
    # What crosses is the product, and the images for the other zero.
    assert [each.shape for each in stages[0].rows] == [(5, 3), (5, 3)]
    outputs, _ = _through(stages, params, images)
    assert (outputs["first"] == jnp.inf).all()
    assert (outputs["last"] == -jnp.inf).all()


# ---- Programs of all kinds.


def _dense(x, w):
    return jax.nn.relu(x @ w)


def test_what_stages_share_is_computed_once_and_what_no_output_needs_not_at_all():
    @jax.jit
    def function(params, x):
        unused = x @ params["d"]
        square = params["a"] @ params["a"]
        first = jax.checkpoint(_dense)(x, square)
        # Also reads the images again, and a matrix made of parameters before the cut.
        second = _dense(first, square) + x @ params["b"]
        return {"second": second, "first": first, "unused": unused}

    params = {name: normal(i, 3, 3) for i, name in enumerate("abd")}
    stages = split(function, ["second", "first"], params, shape(5, 3))
    assert [stage.output for stage in stages] == ["first", "second"]
    # One row: 27 of the square and 9 a product.
    assert [stage.multiply_adds for stage in stages] == [27 + 9, 9 + 9]
    outputs, crossing = _through(stages, params, normal(9, 5, 3))
    # The images and the first output have rows; the square is of the parameters alone.
    assert crossing == [([(5, 3), (5, 3)], [(3, 3)]), ([], [])]
    expected = function(params, normal(9, 5, 3))
    for name in ("first", "second"):
        np.testing.assert_allclose(outputs[name], expected[name], rtol=1e-5)


def test_loops_conditionals_and_constants_are_split():
    table = jnp.arange(3.0)

    def function(params, x):
        looped, each = lax.scan(lambda h, w: (_dense(h, w), h), x, params["w"])
        chosen = lax.cond(params["on"], jnp.sin, jnp.cos, looped)
        return {"a": looped + each[1], "b": chosen + table[None], "c": x * 0 + 1}

    params = {"w": normal(0, 4, 3, 3), "on": jnp.array(True)}
    images = normal(1, 5, 3)
    stages = split(function, ["a", "b"], params, shape(5, 3))
    outputs, _ = _through(stages, params, images)
    expected = function(params, images)
    np.testing.assert_allclose(outputs["a"], expected["a"], rtol=1e-5)
    np.testing.assert_allclose(outputs["b"], expected["b"], rtol=1e-5)


def test_an_output_that_is_another_one_or_no_work_at_all():
    def function(params, x):
        y = x @ params
        return {"y": y, "same": y, "image": x, "constant": jnp.ones((len(x), 1))}

    names = ["same", "y", "constant", "image"]
    stages = split(function, names, normal(0, 3, 3), shape(5, 3))
    # Of equal cost, the order given.
    assert [stage.output for stage in stages] == ["constant", "image", "same", "y"]
    assert [stage.multiply_adds for stage in stages] == [0, 0, 9, 0]
    outputs, _ = _through(stages, normal(0, 3, 3), normal(1, 5, 3))
    expected = function(normal(0, 3, 3), normal(1, 5, 3))
    chex.assert_trees_all_close(outputs, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("move", "shape_of_value"),
    [
        (lambda x: jnp.sin(x).T, r"\(3, 5\)"),
        (lambda x: jnp.sin(jnp.repeat(x, 2, axis=0)), r"\(10, 3\)"),
    ],
)
def test_a_value_without_the_images_as_its_first_axis_is_refused(move, shape_of_value):
    def function(params, x):
        moved = move(x)
        return {"first": x @ params + moved.sum(), "last": (moved @ moved.T) @ (moved @ moved.T)}

    with pytest.raises(ValueError, match=f"split at 'first': {shape_of_value}, .* the 5 images"):
        split(function, ["first", "last"], normal(0, 3, 3), shape(5, 3))


def test_a_square_of_as_many_channels_as_images_is_seen_through():
    # [c, b] with c = b: only another number of images tells the two apart.
    def function(params, x):
        moved = jnp.sin(x).T
        return {"first": x @ params, "mean": moved.sum(0), "last": (moved.T @ params) @ params}

    with pytest.raises(ValueError, match=r"split at 'mean': \(3, 3\)"):
        split(function, ["first", "mean", "last"], normal(0, 3, 3), shape(3, 3))


def test_a_network_that_is_another_one_for_other_numbers_of_images_is_refused():
    def function(params, x):
        y = jnp.sin(x) if len(x) == 5 else x
        return {"first": y, "last": y @ params}

    with pytest.raises(ValueError, match="its program is not the same for 5 and for 10 images"):
        split(function, ["first", "last"], normal(0, 3, 3), shape(5, 3))


class _Plain(nn.Module):
    """A backbone of a user's own, with Flax's layers and batch statistics."""

    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.Conv(3, (3, 3))(image)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        early = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.gelu(nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(early)))
        return nn.Dense(4)(x.mean((1, 2))), {"early": early}


@pytest.mark.optax_dtypes
def test_a_backbone_with_flax_layers_and_batch_statistics():
    network = Network(_Plain(), {"exit": Classifier(endpoints=("early",), classes=4)})
    images = normal(0, 6, 8, 8, 1)
    variables = random_like(shapes_of(network, images))
    stages = split(network.apply, ["main", "exit"], variables, shape(6, 8, 8, 1))
    outputs, crossing = _through(stages, variables, images)
    assert crossing[0] == ([(6, 4, 4, 3)], [])
    expected = jax.jit(network.apply)(variables, images)
    chex.assert_trees_all_close(outputs, expected, rtol=1e-5, atol=1e-6)
