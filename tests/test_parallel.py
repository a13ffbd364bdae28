import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sire_jax.losses import cross_entropy
from sire_jax.metrics import Average
from sire_jax.objectives import Objective
from sire_jax.runs import parallel
from sire_jax.runs.parallel import NEVER
from sire_jax.state import TrainState
from sire_jax.step import make_predict

# Each new size is a compilation.
few = settings(max_examples=12, deadline=None)


@pytest.mark.parametrize(("devices", "batch_size", "used"), [(0, 4, 2), (1, 3, 1), (2, 2, 2)])
def test_a_mesh_has_the_devices_that_are_asked_for(devices, batch_size, used):
    mesh = parallel.device_mesh(devices, "batch", batch_size, 1)
    assert dict(mesh.shape) == {"data": used}
    assert mesh.devices.tolist() == jax.devices()[:used]


@pytest.mark.parametrize("devices", [0, 2])
def test_a_batch_that_cannot_be_shared_is_refused_with_both_numbers(devices):
    with pytest.raises(ValueError, match=r"config.batch_size is 3, which 2 devices can't share"):
        parallel.device_mesh(devices, "batch", 3, 1)


def test_more_devices_than_there_are_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"config.devices is 99, but JAX finds only 2"):
        parallel.device_mesh(99, "batch", 99, 1)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_batch_is_split_over_the_devices(devices):
    mesh = parallel.device_mesh(devices, "batch", 4, 1)
    batch = {"image": jnp.arange(24.0).reshape(4, 2, 3), "label": jnp.arange(4)}
    split = jax.jit(lambda batch: parallel.split_batch(batch, mesh))(batch)
    for key, values in batch.items():
        assert np.array_equal(split[key], values)
        shards = [shard.data for shard in split[key].addressable_shards]
        assert [len(each) for each in shards] == [4 // devices] * devices
        assert np.array_equal(np.concatenate(shards), values)


def _measure(params, model_state, batch, mask, fitted):
    values = batch["value"] * params + model_state
    return {"value": Average.of(values, mask), "square": Average.of(values**2, mask)}


def _lookup(arrays, examples):
    return {"value": arrays[examples]}


@few
@given(st.integers(1, 9), st.sampled_from([1, 2, 4, 11]), st.sampled_from([(), (2,)]))
def test_sums_over_batches_are_those_of_one_big_batch(number, batch_size, shape):
    arrays = jnp.arange(100.0) - 30
    examples = jnp.asarray(np.random.default_rng(number).integers(0, 100, (number, *shape)))
    found = parallel.over_batches(_measure, _lookup, batch_size)(2.0, 1.0, {}, arrays, examples)
    values = 2 * (np.asarray(examples) - 30.0) + 1
    count = values.size
    assert found["value"].total == values.sum()
    assert found["square"].total == (values**2).sum()
    assert found["value"].count == found["square"].count == count


def test_what_fills_up_the_last_batch_does_not_count():
    arrays = jnp.array([jnp.inf, 1.0, 2.0])
    run = parallel.over_batches(_measure, _lookup, 2)
    found = run(1.0, 0.0, {}, arrays, jnp.array([0, 1, 2]))
    assert (float(found["value"].total), float(found["value"].count)) == (np.inf, 3)
    measured = []

    def measure(params, model_state, batch, mask, fitted):
        measured.append(mask.shape)
        return {"mask": Average(mask.sum(), (mask * batch["value"]).sum())}

    found = parallel.over_batches(measure, _lookup, 2)(0.0, 0.0, {}, arrays, jnp.array([1, 2, 2]))
    assert set(measured) == {(2,)}
    assert (float(found["mask"].total), float(found["mask"].count)) == (3, 5)


def _predict(params, model_state, batch):
    return {"twice": params * batch["value"], "row": batch["value"][:, None] + model_state}, batch


@few
@given(st.integers(1, 9), st.sampled_from([1, 2, 4, 11]), st.sampled_from([(), (2,)]))
def test_predictions_are_collected_in_the_order_of_the_examples(number, batch_size, shape):
    arrays = jnp.arange(100.0) - 30
    examples = np.random.default_rng(number).integers(0, 100, (number, *shape))
    run = parallel.collected(_predict, _lookup, batch_size)
    found, batch = run(2.0, jnp.ones((1,) * (2 + len(shape))), arrays, jnp.asarray(examples))
    assert np.array_equal(batch["value"], examples - 30.0)
    assert np.array_equal(found["twice"], 2 * (examples - 30.0))
    assert np.array_equal(found["row"], examples[:, None] - 29.0)


def test_the_named_outputs_are_predicted_in_evaluation():
    seen = []

    def apply(variables, image, *, train):
        seen.append(train)
        x = variables["params"] * image
        return {"main": x + variables["state"], "a": -x, "b": x * 0}

    batch = {"image": jnp.array([1.0, 2.0]), "label": jnp.array([4, 3]), "group": jnp.array([0, 1])}
    objectives = {"main": Objective("main", "label", cross_entropy, ignore=3)}
    predict = make_predict(apply, ["a", "main"], objectives)
    outputs, labels = predict(3.0, {"state": 1.0}, batch)
    assert {name: each.tolist() for name, each in outputs.items()} == {
        "a": [-3, -6],
        "main": [4, 7],
    }
    # Nothing is fitted to what does not count.
    assert labels.tolist() == [4, -1]
    assert seen == [False]


def _run(shared, own, key):
    noise = jax.random.normal(key, (3,))
    return {
        "sum": own["x"] * shared + own["n"].astype(jnp.float32),
        "count": own["n"] + 1,
        "noise": noise,
        "key": jax.random.fold_in(key, own["n"]),
    }


def _arguments(runs):
    own = {"x": jnp.arange(2.0 * runs).reshape(runs, 2), "n": jnp.arange(runs)}
    keys = jax.vmap(jax.random.key)(jnp.arange(runs) + 7)
    return jnp.array([0.5, -2.0]), own, keys


@pytest.mark.parametrize(
    ("runs", "at_once"), [(5, 0), (5, 1), (5, 2), (5, 5), (5, 9), (1, 0), (1, 1), (1, 3)]
)
def test_runs_together_give_what_each_gives_alone(runs, at_once):
    shared, own, keys = _arguments(runs)
    found = jax.jit(parallel.over_seeds(_run, (0,), at_once))(shared, own, keys)
    assert found["sum"].shape == (runs, 2)
    assert found["key"].dtype == keys.dtype
    for i in range(runs):
        alone = _run(shared, jax.tree.map(lambda x, i=i: x[i], own), keys[i])
        here = jax.tree.map(lambda x, i=i: x[i], found)
        assert np.array_equal(here["count"], alone["count"])
        assert np.array_equal(jax.random.key_data(here["key"]), jax.random.key_data(alone["key"]))
        assert np.allclose(here["sum"], alone["sum"], atol=1e-6)
        assert np.allclose(here["noise"], alone["noise"], atol=1e-6)


def test_the_shared_arguments_may_be_anywhere():
    def function(a, shared, b):
        return a * shared + b

    a, b = jnp.arange(3.0), 10 * jnp.arange(3.0)
    for at_once in (1, 2, 3):
        found = parallel.over_seeds(function, (1,), at_once)(a, jnp.asarray(2.0), b)
        assert found.tolist() == [0, 12, 24]


@few
@given(st.sampled_from([1, 6, 20]), st.sampled_from([1, 4, 7]), st.sampled_from([(), (2,)]))
def test_an_epoch_has_every_example_at_most_once(number, batch_size, shape):
    examples = 3 * jnp.arange(number * (2 if shape else 1)).reshape(number, *shape) + 5
    batches = parallel.shuffle(jax.random.key(number), jnp.asarray(2), examples, batch_size)
    steps = number // batch_size
    assert batches.shape == (steps, batch_size, *shape)
    given_rows = {tuple(np.ravel(x)) for x in np.asarray(examples)}
    rows = [tuple(np.ravel(x)) for x in np.asarray(batches).reshape(-1, *shape)]
    assert len(set(rows)) == len(rows) == steps * batch_size
    assert set(rows) <= given_rows


def test_an_epoch_is_shuffled_anew_by_epoch_and_run():
    examples = jnp.arange(50)

    def order(seed, epoch):
        key, epoch = jax.random.key(seed), jnp.asarray(epoch)
        return tuple(parallel.shuffle(key, epoch, examples, 10).ravel().tolist())

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 6
    assert all(sorted(each) == list(range(50)) for each in orders)
    assert tuple(range(50)) not in orders
    assert order(1, 2) == orders[-1]


def test_what_is_left_over_differs_between_epochs():
    batches = [
        parallel.shuffle(jax.random.key(0), jnp.asarray(e), jnp.arange(7), 5) for e in range(20)
    ]
    assert {int(x) for each in batches for x in each.ravel()} == set(range(7))


def _step(state, batch):
    value = batch["value"].sum()
    metrics = {"log": Average(jnp.log(value), value * 0 + 1), "value": Average(value, value * 0)}
    params = state.params * 2 + value
    return dataclasses.replace(state, step=state.step + 1, params=params), metrics


def _take(values, first, count, at=0):
    zero = jnp.zeros((), jnp.float32)
    state = TrainState(jnp.int32(at), jax.random.key(0), zero, {}, {})
    sums = {"log": Average(zero, zero), "value": Average(zero, zero)}
    order = jnp.arange(len(values)).reshape(-1, 2)
    chex.clear_trace_counter()
    run = jax.jit(chex.assert_max_traces(parallel.over_steps(_step, _lookup), n=1))
    return run, (state, sums, jnp.asarray(values), order, jnp.int32(first), jnp.int32(count))


def test_steps_are_taken_in_order_from_the_first_on():
    run, arguments = _take([1.0, 1.0, 3.0, 1.0, 5.0, 1.0, 7.0, 1.0], first=1, count=2, at=10)
    state, sums, broken = run(*arguments)
    assert int(state.step) == 12
    assert float(state.params) == 4 * 2 + 6
    assert float(sums["value"].total) == 10
    assert float(sums["log"].count) == 2
    assert float(sums["log"].total) == pytest.approx(np.log(4) + np.log(6))
    assert {name: int(at) for name, at in broken.items()} == {"log": NEVER, "value": NEVER}
    state, sums, _ = run(state, sums, *arguments[2:4], jnp.int32(3), jnp.int32(1))
    assert (int(state.step), float(state.params)) == (13, 2 * 14 + 8)
    assert float(sums["value"].total) == 18


def test_no_steps_change_nothing():
    run, arguments = _take([1.0, 1.0], first=0, count=0, at=4)
    state, sums, broken = run(*arguments)
    assert (int(state.step), float(state.params), float(sums["log"].count)) == (4, 0, 0)
    assert int(broken["log"]) == NEVER


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, -0.0])
def test_the_first_step_that_is_not_finite_is_reported(value):
    # The logarithm is not finite in the third and the fifth step, the first of which is number 7.
    values = [1.0, 0.0, 1.0, 0.0, value, -0.0, 1.0, 0.0, value, -0.0]
    run, arguments = _take(values, first=0, count=5, at=7)
    state, _, broken = run(*arguments)
    assert int(state.step) == 12
    assert int(broken["log"]) == 9
    assert int(broken["value"]) == (NEVER if np.isfinite(value) else 9)
