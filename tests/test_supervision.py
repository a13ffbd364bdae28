"""The supervision ratio of layers, and the conflict between outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sire_jax import configuration, traced
from sire_jax.configuration import experiment
from sire_jax.diagnostics import conflict, supervision
from sire_jax.diagnostics.supervision import Norms, ratios
from sire_jax.runs.loading import load_data
from sire_jax.runs.trained import Trained
from sire_jax.step import make_losses
from sire_jax.weights import depth_weights

CONFIGS = configuration.repository_configs()
DIGITS = {
    "data.name": "digits",
    "data.shape": "(8, 8, 1)",
    "data.mean": "()",
    "data.std": "()",
    "data.images": 1198,
    "backbone.depth": 14,
    "backbone.width": 0.25,
    "heads.exit.layers": "(5, 9)",
    "devices": 1,
}


def _config(variant, **overrides):
    given = {**DIGITS, **overrides}
    if variant.startswith("resnet"):
        given.pop("heads.exit.layers")
    return configuration.load(
        f"{CONFIGS}/auxnet.py:{variant}",
        [f"--config.{key}={value}" for key, value in given.items()],
    )


@pytest.fixture(scope="module")
def trained():
    with pytest.warns(UserWarning, match="are many"):
        parts = experiment.build(_config("56-3"))
    dataset, (draw,) = load_data(parts)
    arrays = jax.tree.map(jnp.asarray, parts.task.prepare(dataset.train))
    batch = parts.lookup(arrays, jnp.asarray(draw.train[:6]), "measured")
    state = parts.initial_state(0)
    return Trained(parts, state.step, state.params, state.model_state, batch)


def test_ratios_by_hand():
    norms = Norms(
        layers=[1, 3, 5],
        at={"exit": 3, "main": 5},
        by_loss={"exit": np.array([4.0, 2.0, 0.0]), "main": np.array([10.0, 5.0, 1.0])},
        joint=np.array([8.0, 4.0, 1.0]),
        effective=np.array([9.0, 3.0, 1.0]),
        weights={"exit": 0.5, "main": 1.0},
        divisors={"exit": 2.0, "main": 1.0},
    )
    found = ratios(norms)
    # Of the main loss 1 / |dL/dx_l|; of the exit, the nearest output of two layers, 2 / |dL/dx_l|.
    np.testing.assert_allclose(found["main"], [0.1, 0.2, 1.0])
    np.testing.assert_allclose(found["multiway"], [0.5, 1.0, 1.0])
    # The parts that are supervision: 0.5 x 2 of the exit and 1 of the main loss.
    np.testing.assert_allclose(found["joint"], [2**0.5 / 8, 2**0.5 / 4, 1.0])
    np.testing.assert_allclose(found["effective_joint"], [1.25**0.5 / 9, 1.25**0.5 / 3, 1.0])


def test_norms_are_those_of_gradients_to_features(trained):
    norms = supervision.measure(trained)
    assert norms.layers == [1, 3, 5, 7, 9, 11, 13]
    assert norms.at == {"exit_5": 5, "exit_9": 9, "main": 13}
    # Nothing of an exit behind it; the nearest output's ratio at its own layer is 1.
    assert norms.by_loss["exit_5"].astype(bool).tolist() == [True] * 3 + [False] * 4
    np.testing.assert_allclose(ratios(norms)["multiway"][[2, 4, 6]], 1, rtol=1e-6)
    gammas = depth_weights([5, 9], 2.0)
    np.testing.assert_allclose([norms.weights["exit_5"], norms.weights["exit_9"]], gammas)
    np.testing.assert_allclose(norms.divisors["exit_5"], sum(gammas), rtol=1e-6)
    # Behind the last exit there is the main loss alone.
    np.testing.assert_allclose(norms.joint[5:], norms.by_loss["main"][5:], rtol=1e-5)


def test_the_norm_at_a_layer_is_the_slope_along_its_gradient(trained):
    # |dL/dx_l| is how fast the loss rises in the direction of the gradient: by differences.
    norms = supervision.measure(trained)
    parts, name = trained.parts, list(trained.parts.network.backbone.plan.layers())[4]
    zeros = supervision._zeros(trained, [name])[name]

    def loss(offset):
        def apply(variables, image, **settings):
            given = {**variables, "offsets": {"backbone": {name: offset}}}
            return parts.network.apply(given, image, **settings)

        key = jax.random.key(0)
        losses = make_losses(apply, parts.objectives, trained.batch, key)
        return losses(trained.params, trained.model_state)[0]["main"]

    loss = jax.jit(loss)
    gradient = jax.jit(jax.grad(loss))(zeros)
    norm = float(jnp.sqrt((gradient**2).sum()))
    np.testing.assert_allclose(norms.by_loss["main"][4], norm, rtol=1e-5)
    size = 0.05
    ahead, behind = loss(size * gradient / norm), loss(-size * gradient / norm)
    np.testing.assert_allclose((ahead - behind) / (2 * size), norm, rtol=0.05)


def test_a_backbone_without_a_plan_has_no_layers(trained):
    class Bare:
        backbone = object()

    bare = Trained(_replaced(trained.parts, Bare()), *_rest(trained))
    with pytest.raises(ValueError, match="the backbone has none"):
        supervision.measure(bare)


def _replaced(parts, network):
    return type("Parts", (), {**vars(parts), "network": network})()


def _rest(trained):
    return trained.step, trained.params, trained.model_state, trained.batch


def test_cosines_by_hand():
    # Gradients (1, 0) and (3, 4) of what both share; (0, 5) and (3, 4) where only two do.
    slopes = {"a": [1.0, 0.0], "b": [3.0, 4.0], "main": [-1.0, 0.0]}
    deep = {"b": [0.0, 5.0], "main": [3.0, 4.0]}

    def losses(params, model_state):
        named = {n: (params["shallow"] * jnp.asarray(s)).sum() for n, s in slopes.items()}
        for name, slope in deep.items():
            named[name] = named[name] + (params["deep"] * jnp.asarray(slope)).sum()
        return named, ({}, model_state)

    params = {"shallow": jnp.ones(2), "deep": jnp.ones(2)}
    reach = traced.reach(lambda p: losses(p, {})[0], params)
    found = conflict.cosines_of(losses, reach, params, {})
    assert list(found) == [("a", "b", "main"), ("b", "main")]
    np.testing.assert_allclose(
        found["a", "b", "main"], [[1, 0.6, -1], [0.6, 1, -0.6], [-1, -0.6, 1]], atol=1e-6
    )
    np.testing.assert_allclose(found["b", "main"], [[1, 0.8], [0.8, 1]], atol=1e-6)


def test_losses_that_share_nothing_have_no_conflict():
    def losses(params, model_state):
        return {"a": params["a"].sum(), "main": params["b"].sum()}, ({}, model_state)

    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    reach = traced.reach(lambda p: losses(p, {})[0], params)
    with pytest.raises(ValueError, match="No two of the losses a, main share a parameter"):
        conflict.cosines_of(losses, reach, params, {})


def test_cosines_of_a_network_lie_between_minus_1_and_1_and_are_drawn(trained, tmp_path):
    found = conflict.measure(trained)
    assert list(found) == [("exit_5", "exit_9", "main"), ("exit_9", "main")]
    for matrix in found.values():
        np.testing.assert_allclose(np.diag(matrix), 1, rtol=1e-5)
        assert np.abs(matrix).max() <= 1 + 1e-5
    conflict.draw(found).savefig(tmp_path / "conflict.png")
    norms = supervision.measure(trained)
    picture = supervision.draw({"one": (norms, "multiway"), "two": (norms, "joint")})
    picture.savefig(tmp_path / "supervision.png")
    assert (tmp_path / "supervision.png").stat().st_size > 5000
    assert [line.get_lw() for line in picture.axes[1].get_lines()[:4]] == [1.0, 2.6, 1.0, 1.0]
