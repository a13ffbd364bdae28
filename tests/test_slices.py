"""Reach slice by slice: layers, members and positions that share an array."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from branched import assert_close
from flax import linen as nn
from jax import lax
from planned import normal

from sire_jax import optimizers, traced
from sire_jax.slices import Partly, Unclear
from sire_jax.updates import UPDATES, joint, multiway, pairwise, weighted
from sire_jax.updates.aggregators import UPGrad
from sire_jax.updates.reached import Reached
from sire_jax.updates.weightings import GradNorm

KEY = jax.random.key(0)
X = normal(0, 2, 3)


def _reach(losses, params, *args):
    """Returns for each loss and parameter a boolean, or which slices along the first axis."""

    def plain(reach):
        if isinstance(reach, Unclear):
            return "unclear"
        if not isinstance(reach, Partly):
            return reach
        assert reach.mask.shape[1:] == (1,) * (reach.mask.ndim - 1)
        return reach.mask.ravel().tolist()

    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p, jnp.float32), params, is_leaf=_is_shape)
    return {name: jax.tree.map(plain, t) for name, t in traced.reach(losses, shapes, *args).items()}


def _is_shape(value):
    return isinstance(value, tuple) and all(isinstance(each, int) for each in value)


def _scanned(layers, x=X):
    """Returns the features after each of several layers that one array holds."""

    def body(h, layer):
        h = h + jnp.tanh(h @ layer)
        return h, h

    return lax.scan(body, x, layers)[1]


FIRST = [True, False, False, False]
UP_TO_THIRD = [True, True, True, False]


# ---- What is reached.


def test_an_exit_reaches_the_layers_before_it_in_a_scan():
    def losses(p):
        after = _scanned(p["layers"])
        return {f"after_{i}": after[i].sum() for i in range(4)} | {"last": after[-1].sum()}

    reached = {name: tree["layers"] for name, tree in _reach(losses, {"layers": (4, 3, 3)}).items()}
    expected = {f"after_{i}": [j <= i for j in range(4)] for i in range(3)}
    assert reached == {**expected, "after_3": True, "last": True}


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_a_scan_is_followed_in_calls_in_reverse_and_in_a_scan(wrap):
    def losses(p):
        backwards = lax.scan(lambda h, w: (h * w, h * w), X[0, 0], p["w"], reverse=True)[1]
        grid = lax.scan(
            lambda h, row: lax.scan(lambda h, w: (h * w, h * w), h, row), X[0, 0], p["grid"]
        )[1]
        return {"backwards": wrap(lambda x: x)(backwards)[2], "grid": grid[1, 0]}

    reach = traced.reach(wrap(losses), {"w": jnp.ones(4), "grid": jnp.ones((3, 2))})
    assert reach["backwards"]["w"].mask.tolist() == [False, False, True, True]
    # Of the second row only the first, but marks are kept axis by axis.
    assert reach["grid"]["grid"].mask.ravel().tolist() == [True, True, False]


def test_axes_that_lie_on_one_device_are_told_apart_on_several():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(
        lambda a, b: (a * 2, b * 3), mesh=mesh, in_specs=(spec, spec), out_specs=(spec, spec)
    )

    def losses(p):
        first, second = mapped(p["a"], p["b"].T)
        return {"first": first[0], "second": second.sum(), "third": second[:, 1].sum()}

    assert _reach(losses, {"a": (4,), "b": (3, 4)}) == {
        "first": {"a": "unclear", "b": False},
        "second": {"a": False, "b": True},
        "third": {"a": False, "b": [False, True, False]},
    }


CASES = {
    # What layers have in common they reach as a whole: a carry adds up all turns.
    "recurrent": (
        lambda p: _turns(p).sum(),
        {"w": (3, 3)},
        {"w": True},
    ),
    "indexed": (lambda p: (X @ p["w"][0]).sum(), {"w": (4, 3, 3)}, {"w": FIRST}),
    "from the end": (
        lambda p: (X @ p["w"][-4]).sum() + p["w"][2].sum() + p["w"][1, 0, 0],
        {"w": (4, 3, 3)},
        {"w": UP_TO_THIRD},
    ),
    "all indexed": (
        lambda p: sum((X @ p["w"][i]).sum() for i in range(4)),
        {"w": (4, 3, 3)},
        {"w": True},
    ),
    "stacked": (
        lambda p: (jnp.stack([p["w"][2], p["w"][0]]) @ X.T)[1].sum(),
        {"w": (4, 3, 3)},
        {"w": FIRST},
    ),
    "split": (
        lambda p: jnp.split(p["w"], [1, 3])[0].sum() + jnp.split(p["w"], 2)[0].sum(),
        {"w": (4, 3)},
        {"w": [True, True, False, False]},
    ),
    "joined": (
        lambda p: jnp.concatenate([p["a"], p["b"]])[:3].sum(),
        {"a": (2, 3), "b": (2, 3), "c": (2, 3)},
        {"a": True, "b": [True, False], "c": False},
    ),
    "not taken": (
        lambda p: jnp.concatenate([p["a"], p["b"]])[:2].sum(),
        {"a": (2,), "b": (2,)},
        {"a": True, "b": False},
    ),
    "reversed, reshaped, moved": (
        lambda p: p["w"][::-1].reshape(2, 2, 3).transpose(1, 0, 2)[0, 1].sum(),
        {"w": (4, 3)},
        {"w": [False, True, False, False]},
    ),
    "members": (
        lambda p: jax.vmap(lambda w, b: jnp.tanh(X @ w) + b[None])(p["w"], p["b"])[0].sum(),
        {"w": (4, 3, 3), "b": (4, 3)},
        {"w": FIRST, "b": FIRST},
    ),
    "members that convolve": (
        lambda p: jax.vmap(lambda k: _convolved(jnp.tanh(_convolved(IMAGES, k)), k))(p["k"])[
            0
        ].sum(),
        {"k": (4, 3, 3, 2, 2)},
        {"k": FIRST},
    ),
    "members that convolve their own": (
        lambda p: jax.vmap(_convolved)(p["x"][:, None], p["k"])[0].sum(),
        {"x": (4, 5, 5, 2), "k": (4, 3, 3, 2, 2)},
        {"x": FIRST, "k": FIRST},
    ),
    "one token of a convolution": (
        lambda p: _convolved(IMAGES, p["k"])[:, 0, 0].sum(),
        {"k": (3, 3, 2, 2)},
        {"k": True},
    ),
    "one feature": (lambda p: (X @ p["w"].T)[:, 0].sum(), {"w": (4, 3)}, {"w": FIRST}),
    "mean of members": (
        lambda p: jax.vmap(lambda w: X @ w)(p["w"]).mean(0)[0].sum(),
        {"w": (4, 3, 3)},
        {"w": True},
    ),
    # Look-ups of many places are those of embeddings: by data.
    "looked up": (lambda p: p["w"][jnp.asarray([0, 1])].sum(), {"w": (4, 3)}, {"w": True}),
    "members that look up": (
        lambda p: jax.vmap(lambda w: jnp.take_along_axis(X @ w, jnp.ones((2, 1), int), 1))(p["w"])[
            0
        ].sum(),
        {"w": (4, 3, 3)},
        {"w": FIRST},
    ),
    "an embedding, up to a position": (
        lambda p: lax.scan(_turn(p["w"]), X, p["table"][TOKENS])[1][1].sum(),
        {"table": (7, 3), "w": (3, 3)},
        {"table": True, "w": True},
    ),
    "taken": (lambda p: jnp.take(p["w"], 0, axis=0).sum(), {"w": (4, 3)}, {"w": "unclear"}),
    "at a changing place": (
        lambda p: lax.fori_loop(0, 4, lambda i, h: h @ p["w"][i], X).sum(),
        {"w": (4, 3, 3)},
        {"w": "unclear"},
    ),
    "put at a changing place": (
        lambda p: _buffered(p)[1].sum(),
        {"layers": (4, 3, 3), "shared": (3, 3)},
        {"layers": "unclear", "shared": True},
    ),
    "taken at a changing place, of one step": (
        lambda p: lax.scan(_turn(p["w"]), X, p["x"][:, None] + jnp.zeros((5, 2, 3)))[1][1].sum(),
        {"w": (3, 3), "x": (5, 3)},
        {"w": True, "x": [True, True, False, False, False]},
    ),
    "some positions": (
        lambda p: _attended(X[:, None] + p["positions"][None, :4], p["w"])[:, 0].sum(),
        {"positions": (6, 3), "w": (3, 3)},
        {"positions": [True] * 4 + [False] * 2, "w": True},
    ),
    "a class token": (
        lambda p: _attended(X[:, None] + p["positions"][None], p["w"])[:, 0].sum(),
        {"positions": (4, 3), "w": (3, 3)},
        {"positions": True, "w": True},
    ),
    "a class token through one layer": (
        lambda p: jnp.tanh(jnp.stack([X] * 4, 1) @ p["w"] + p["b"][None, None])[:, 0].sum(),
        {"w": (3, 3), "b": (3,)},
        {"w": True, "b": True},
    ),
    "tokens flattened": (
        lambda p: (jnp.ones((8, 3)) @ p["w"]).reshape(2, 4, 3)[:, 0].sum(),
        {"w": (3, 3)},
        {"w": True},
    ),
    "conditional": (
        lambda p: lax.cond(X.sum() > 0, lambda w: w[0].sum(), lambda w: -w[0].sum(), p["w"]),
        {"w": (4, 3)},
        {"w": FIRST},
    ),
    "accumulated": (lambda p: jnp.cumsum(p["w"], 0)[2].sum(), {"w": (4, 3)}, {"w": UP_TO_THIRD}),
    "accumulated from the end": (
        lambda p: lax.cumsum(p["w"][::-1], 0, reverse=True)[1].sum(),
        {"w": (4, 3)},
        {"w": UP_TO_THIRD},
    ),
    "an operation that is not known": (
        lambda p: _unfollowed(p["w"])[0].sum(),
        {"w": (4, 3)},
        {"w": "unclear"},
    ),
    "an operation that is not known, of tokens": (
        lambda p: _unfollowed(jnp.stack([X] * 4, 1) @ p["w"] + p["b"][None, None])[:, 0].sum(),
        {"w": (3, 3), "b": (3,)},
        {"w": True, "b": True},
    ),
}
IMAGES = normal(3, 1, 5, 5, 2)


TOKENS = jnp.asarray([[0, 1], [2, 3], [4, 5]])


def _turn(w):
    def turn(h, x):
        h = jnp.tanh(h @ w + x)
        return h, h

    return turn


def _buffered(p):
    """Returns the features after each of several layers, put into an array one by one."""

    def body(carry, layer):
        i, h, after = carry
        h = jnp.tanh(h @ layer @ p["shared"])
        return (i + 1, h, after.at[i].set(h)), None

    return lax.scan(body, (0, X, jnp.zeros((4, 2, 3))), p["layers"])[0][2]


@jax.custom_vjp
def _unfollowed(x):
    return x


def _whatever(_, cotangent):
    shape = jax.ShapeDtypeStruct(cotangent.shape, cotangent.dtype)
    return (jax.pure_callback(lambda c: c, shape, cotangent),)


_unfollowed.defvjp(lambda x: (x, None), _whatever)


def _convolved(images, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=layout)


def _turns(p):
    return lax.scan(lambda h, x: (jnp.tanh(h @ p["w"] + x), h), X, jnp.ones((5, 2, 3)))[1][3]


def _attended(tokens, w):
    shares = jax.nn.softmax((tokens @ w) @ tokens.swapaxes(1, 2))
    return tokens + shares @ tokens


@pytest.mark.parametrize("case", CASES)
def test_slices_are_reached_that_a_loss_is_of(case):
    loss, params, expected = CASES[case]
    assert _reach(lambda p: {"loss": loss(p)}, params)["loss"] == expected


def test_slices_are_those_of_the_gradient():
    in_part = [
        case for case in CASES.values() if any(isinstance(v, list) for v in case[2].values())
    ]

    @jax.jit
    def gradients(given):
        return [jax.grad(case[0])(params) for case, params in zip(in_part, given, strict=True)]

    # Of random numbers no gradient is zero by chance.
    given = [{k: normal(7, *shape) for k, shape in case[1].items()} for case in in_part]
    for (_, _, expected), gradient in zip(in_part, gradients(given), strict=True):
        for name, values in gradient.items():
            moves = (np.asarray(values) != 0).reshape(len(values), -1).any(1)
            assert moves.tolist() == np.broadcast_to(expected[name], moves.shape).tolist()


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = x + nn.tanh(nn.Dense(3, name="dense")(x))
        return y, y


class Stacked(nn.Module):
    """Layers of nn.scan, with an exit after the first."""

    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        last, after = scanned(name="layers")(x, None)
        return {"main": nn.Dense(2)(last), "exit": nn.Dense(2)(after[0])}


def test_a_scan_of_flax_is_followed():
    network = Stacked()
    params = jax.eval_shape(network.init, KEY, X)["params"]
    reach = traced.reach(
        lambda p: {k: (v**2).sum() for k, v in network.apply({"params": p}, X).items()}, params
    )
    # Layers of 3 x 3 + 3, heads of 3 x 2 + 2.
    sizes = {name: traced.size(params, tree) for name, tree in reach.items()}
    assert sizes == {"exit": 12 + 8, "main": 4 * 12 + 8}
    message = (
        r"The objective 'exit' reaches 1 of 4 slices of the parameter 'layers/dense/bias', \(4, 3\)"
        r", of which others reach more: .* Python loop in place of nn.scan, .*'joint'"
    )
    with pytest.raises(ValueError, match=message):
        multiway(optimizers.sgd(), reach)


POOLED = {
    "max_pool": lambda x: nn.max_pool(x, (2, 2), (2, 2)),
    "avg_pool": lambda x: nn.pooling.pool(x, 0.0, lax.add, (2, 2), (1, 1), "SAME"),
    "cumsum": lambda x: jnp.cumsum(x, 1),
    "cumprod": lambda x: jnp.cumprod(x, 2),
    "cummax": lambda x: lax.cummax(x, 1, reverse=True),
    "cumlogsumexp": lambda x: lax.cumlogsumexp(x, 3),
    "sort": lambda x: jnp.sort(x, 1),
    "fft": lambda x: (
        jnp.fft.fft(x).real + jnp.fft.irfft2(jnp.fft.rfft2(x, axes=(1, 2)), axes=(1, 2))
    ),
    "take": lambda x: jnp.take(x, jnp.asarray([3, 1]), 1),
    "take one": lambda x: jnp.take(x, 1, 2),
    "top_k": lambda x: lax.top_k(x, 2)[0],
}


class Member(nn.Module):
    """One of an ensemble, with an operation that acts on its images alone."""

    name_of_operation: str

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(4, name="features")(x))
        x = POOLED[self.name_of_operation](x)
        return nn.Dense(2, name="classes")(x.reshape(len(x), -1))


class Ensemble(nn.Module):
    """Members of nn.vmap, with an exit that is the first."""

    name_of_operation: str

    @nn.compact
    def __call__(self, x):
        members = nn.vmap(
            Member,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=3,
        )(self.name_of_operation, name="members")(x)
        return {"main": members.mean(0), "exit": members[0]}


@pytest.mark.parametrize("operation", POOLED)
def test_members_of_an_ensemble_are_told_apart(operation):
    images = jnp.zeros((2, 4, 4, 2))
    network = Ensemble(operation)
    params = jax.eval_shape(network.init, KEY, images)["params"]
    reach = traced.reach(
        lambda p: {k: (v**2).sum() for k, v in network.apply({"params": p}, images).items()}, params
    )
    assert [each is True for each in jax.tree.leaves(reach["main"])] == [True] * 4
    masks = [each.mask.ravel().tolist() for each in jax.tree.leaves(reach["exit"])]
    assert masks == [[True, False, False]] * 4
    with pytest.raises(
        ValueError, match=r"'exit' reaches 1 of 3 slices of .*'members/classes/bias'"
    ):
        multiway(optimizers.sgd(), reach)


def _looped(p, first, last, h):
    return lax.fori_loop(first, last, lambda i, h: jnp.tanh(h @ p["layers"][i]), h)


def test_layers_at_a_changing_index_are_not_treated_apart():
    def losses(p):
        half = _looped(p, 0, 2, X)
        return {"exit": half.sum(), "main": _looped(p, 2, 4, half).sum()}

    reach = traced.reach(losses, {"layers": jnp.zeros((4, 3, 3))})
    message = (
        r"'exit' reaches some slices of the parameter 'layers', \(4, 3, 3\), not known which, and"
        r" others may reach others: .* can't be told apart\. Give the layers parameters"
    )
    for rule in (multiway, pairwise, UPDATES["effective_joint"]):
        with pytest.raises(ValueError, match=message):
            rule(optimizers.sgd(), reach)
    # A sum takes the array as a whole, decay included.
    joint(optimizers.sgd(), reach)
    assert Reached.of(reach).any() == {"layers": True}


def test_losses_after_the_same_layers_at_a_changing_index_are_treated_apart():
    def losses(p):
        h = _looped(p, 0, 4, X)
        return {"exit": (h @ p["exit"]).sum(), "main": jnp.tanh(h @ p["main"]).sum()}

    params = {"layers": jnp.zeros((4, 3, 3)), "exit": jnp.zeros((3, 2)), "main": jnp.zeros((3, 2))}
    reach = traced.reach(losses, params)
    assert isinstance(reach["exit"]["layers"], Unclear)
    assert traced.size(params, reach["exit"]) == 4 * 9 + 6
    multiway(optimizers.sgd(), reach)
    with pytest.raises(ValueError, match=r"no parameter is reached, all of it, by all of"):
        weighted(joint(optimizers.sgd(), reach), GradNorm(), reach)


class Tokens(nn.Module):
    """A transformer's block, with outputs of some positions, picked in all ways."""

    @nn.compact
    def __call__(self, tokens):
        positions = nn.Embed(6, 4)(jnp.arange(6)) + nn.Embed(2, 4)(jnp.zeros(6, int))
        embedded = nn.Embed(7, 4)(tokens)
        x = embedded + positions[None]
        mask = nn.make_causal_mask(tokens)
        x = x + nn.MultiHeadDotProductAttention(2)(x, x) + nn.SelfAttention(2)(x, mask=mask)
        best = lax.top_k(x[..., 0], 2)[1]
        outputs = {
            "embedded": embedded[:, 0],
            "first": x[:, 0],
            "taken": jnp.take(x, 0, axis=1),
            "from a place": lax.dynamic_slice_in_dim(x, tokens[0, 0], 2, 1).mean(1),
            "best": jnp.take_along_axis(x, best[..., None], 1).mean(1),
            "last": x[jnp.arange(2), tokens[:, 0]],
            "sorted": jnp.sort(x, 1)[:, 0],
            "pooled": nn.max_pool(x, (2,), (2,))[:, 0],
            "rolled": jnp.roll(x, tokens[0, 0], 1)[:, 0],
            "recurrent": nn.RNN(nn.SimpleCell(4))(x)[:, 2],
            "unfollowed": _unfollowed(x)[:, 0],
            "main": x.mean(1),
        }
        return {name: nn.Dense(2)(features) for name, features in outputs.items()}


def test_what_becomes_of_positions_is_no_matter_of_parameters():
    network, tokens = Tokens(), jnp.zeros((2, 6), int)
    params = jax.eval_shape(network.init, KEY, tokens)["params"]

    def losses(p, tokens):
        return {k: (v**2).sum() for k, v in network.apply({"params": p}, tokens).items()}

    reach = traced.reach(losses, params, tokens)
    assert set(jax.tree.leaves(reach)) == {True, False}
    assert reach["embedded"]["Embed_2"] == {"embedding": True}
    multiway(optimizers.sgd(), reach)


# ---- What is done with it.

STACKED = {"layers": normal(1, 4, 3, 3), "exit": normal(2, 3, 2), "main": normal(3, 3, 2)}
ALONE = {**STACKED, "layers": list(STACKED["layers"])}
WEIGHTS = {"exit": jnp.float32(0.5), "main": jnp.float32(1.5)}


def _losses(last):
    """Makes losses of an exit after the first layer and of a main output after another."""

    def losses(params, model_state):
        layers = params["layers"]
        if isinstance(layers, list):
            after, h = [], X
            for layer in layers:
                h = h + jnp.tanh(h @ layer)
                after.append(h)
        else:
            after = _scanned(layers)
        outputs = {"exit": after[0] @ params["exit"], "main": after[last] @ params["main"]}
        return {k: (v**2).mean() for k, v in outputs.items()}, (outputs, model_state)

    return losses


def _trees(last, params):
    return traced.reach(lambda p: _losses(last)(p, {})[0], params)


def _steps(rule, last, params, number=3):
    update = jax.jit(lambda *given: rule.update(_losses(last), WEIGHTS, *given, KEY))
    state = rule.init(params)
    for _ in range(number):
        updated = update(params, {}, state)
        params, state = updated.params, updated.state
    return params


@pytest.mark.parametrize("last", [3, 1])
def test_joint_steps_of_layers_in_one_array_are_those_of_layers_apart(last):
    optimizer = optimizers.sgd(0.1, 0.3, 0.9)
    apart = _steps(joint(optimizer, _trees(last, ALONE)), last, ALONE)
    stacked = _steps(joint(optimizer, _trees(last, STACKED)), last, STACKED)
    assert_close(stacked, {**apart, "layers": jnp.stack(apart["layers"])})
    assert float(jnp.abs(stacked["layers"][: last + 1] - STACKED["layers"][: last + 1]).min()) > 0
    # What no loss reaches does not decay, either.
    unreached = np.asarray(stacked["layers"][last + 1 :])
    assert unreached.tobytes() == np.asarray(STACKED["layers"][last + 1 :]).tobytes()


@pytest.mark.parametrize(
    "make",
    [
        *(UPDATES[name] for name in ("multiway", "pairwise", "effective_joint")),
        lambda *given: joint(*given, adjust=True),
        lambda *given: joint(*given, aggregator=UPGrad()),
    ],
)
def test_losses_that_reach_different_slices_are_not_treated_apart(make):
    with pytest.raises(ValueError, match=r"'exit' reaches 1 of 4 slices of .* 'layers', \(4, 3, 3"):
        make(optimizers.sgd(), _trees(3, STACKED))
    make(optimizers.sgd(), _trees(3, ALONE))


@pytest.mark.parametrize("rule", [multiway, pairwise])
def test_losses_that_reach_the_same_slices_are(rule):
    def losses(params, state):
        h = jnp.tanh(X[:, None] + params["positions"][None, :4]).sum(1)
        return {"a": (h**2).sum(), "main": h.sum()}, ({}, state)

    start = {"positions": normal(4, 6, 3)}
    trees = traced.reach(lambda p: losses(p, {})[0], start)
    made = rule(optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1)), trees)
    weights = {"a": jnp.float32(1), "main": jnp.float32(1)}
    update = jax.jit(lambda *given: made.update(losses, weights, *given, KEY))
    moved = update(start, {}, made.init(start)).params["positions"]
    assert float(jnp.abs(moved[:4] - start["positions"][:4]).min()) > 0
    assert np.asarray(moved[4:]).tobytes() == np.asarray(start["positions"][4:]).tobytes()


def test_gradnorm_leaves_out_what_is_reached_in_part():
    trees = _trees(3, STACKED)
    with pytest.raises(ValueError, match=r"no parameter is reached, all of it, by all of"):
        weighted(joint(optimizers.sgd(), trees), GradNorm(), trees)
    apart = _trees(3, ALONE)
    weighted(joint(optimizers.sgd(), apart), GradNorm(), apart)


def test_groups_of_shared_parameters_are_not_made_of_slices():
    with pytest.raises(ValueError, match="can't be treated apart"):
        Reached.of(_trees(3, STACKED)).groups()
