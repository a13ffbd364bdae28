import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sire_jax.checkpoint import Checkpoints


def _tree(seed=0):
    key = jax.random.key(seed)
    odd = jnp.array([0.0, -0.0, jnp.inf, jnp.nan, 1e-42, 1 / 3], jnp.float32)
    return {
        "params": {"kernel": jax.random.normal(key, (3, 4)), "odd": odd},
        "half": jax.random.normal(key, (2, 5), jnp.bfloat16),
        "step": jnp.asarray(2**31 - 1 - seed, jnp.int32),
        "key": key,
        "keys": jax.random.split(key, 3),
        "list": [jnp.full((1, 2), 7, jnp.uint8), jnp.array([True, False])],
    }


def _bits(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return str(jax.random.key_impl(x)), _bits(jax.random.key_data(x))
    return x.shape, str(x.dtype), np.asarray(x).tobytes()


def _assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert [_bits(x) for x in jax.tree.leaves(a)] == [_bits(x) for x in jax.tree.leaves(b)]


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "new" / "checkpoints")
    yield made
    made.close()


def _saved(directory, keep=2, steps=(3, 20, 100)):
    made = Checkpoints(directory, keep=keep)
    for step in steps:
        made.save(step, _tree(step))
    made.close()
    return sorted(int(each.name) for each in directory.iterdir())


def test_a_tree_is_restored_bit_for_bit(checkpoints):
    tree = _tree()
    checkpoints.save(5, tree)
    like = jax.tree.map(jnp.zeros_like, tree)
    _assert_same(checkpoints.restore(like), tree)
    assert checkpoints.latest() == 5
    restored = checkpoints.restore(like)
    draw = jax.random.normal(restored["key"], (3,))
    assert jnp.array_equal(draw, jax.random.normal(tree["key"], (3,)))


def test_shapes_are_enough_to_restore(checkpoints):
    tree = _tree()
    checkpoints.save(5, tree)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
    _assert_same(checkpoints.restore(like), tree)


@pytest.mark.parametrize(("keep", "left"), [(1, [100]), (2, [20, 100]), (5, [3, 20, 100])])
def test_the_newest_checkpoints_are_kept(tmp_path, keep, left):
    assert _saved(tmp_path, keep) == left


def test_the_newest_of_several_is_restored_by_another_program(tmp_path):
    _saved(tmp_path)
    again = Checkpoints(tmp_path)
    assert again.latest() == 100
    _assert_same(again.restore(_tree()), _tree(100))
    again.close()


def test_a_step_is_saved_once(checkpoints):
    checkpoints.save(5, _tree(1))
    checkpoints.save(5, _tree(2))
    _assert_same(checkpoints.restore(_tree()), _tree(1))


def test_restoring_without_a_checkpoint_says_so(checkpoints):
    assert checkpoints.latest() is None
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*new/checkpoints"):
        checkpoints.restore(_tree())
