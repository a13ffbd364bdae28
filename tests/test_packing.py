import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sire_jax.storage import packing
from sire_jax.storage.packing import ArrayType


def test_bytes_follow_one_another_in_the_order_of_the_arrays():
    arrays = [jnp.array([[1, 2], [3, 4]], jnp.uint8), jnp.float32(1), np.array([True, False])]
    packed = packing.pack(arrays)
    assert packed.tolist() == [1, 2, 3, 4, 0, 0, 0x80, 0x3F, 1, 0]
    assert packing.size(arrays) == 10
    restored = packing.unpack(packed, arrays)
    assert [x.tolist() for x in restored] == [[[1, 2], [3, 4]], 1, [True, False]]
    assert [type(x) for x in restored[1:]] == [type(arrays[1]), np.ndarray]


def test_columns_first_and_keys_are_packed_as_they_are_numbered():
    columns = np.asfortranarray(np.array([[1, 2], [3, 4]], np.uint8))
    key = jax.random.wrap_key_data(jnp.array([5, 6], jnp.uint32))
    packed = packing.pack([columns, key])
    assert packed.tolist() == [1, 2, 3, 4, 5, 0, 0, 0, 6, 0, 0, 0]
    shape = jax.ShapeDtypeStruct((), key.dtype)
    assert packing.size([columns, shape]) == 12
    assert jax.random.key_data(packing.unpack(packed, [columns, shape])[1]).tolist() == [5, 6]


def test_nothing_is_a_byte():
    assert packing.pack([]).tolist() == packing.pack([jnp.zeros((0, 2))]).tolist() == [0]
    assert packing.unpack(np.zeros(1, np.uint8), [jnp.zeros((0, 2))])[0].shape == (0, 2)


def test_arrays_are_listed_by_path():
    listed = packing.flatten({"b": [jnp.zeros(1), None], "a": (3, {})})
    assert list(listed) == ["['a'][0]", "['b'][0]"]
    assert [str(ArrayType.of(x)) for x in listed.values()] == ["int64[]", "float32[1]"]
    assert ArrayType.of(jnp.zeros(1)) == ArrayType((1,), "float32")
    assert str(ArrayType.of(jax.random.split(jax.random.key(0), 3))) == "key<fry>[3]"


class _Twins:
    def __init__(self, *children):
        self.children = children


def test_arrays_of_one_path_are_refused():
    key = jax.tree_util.GetAttrKey("same")
    jax.tree_util.register_pytree_with_keys(
        _Twins, lambda t: ([(key, x) for x in t.children], None), lambda _, xs: _Twins(*xs)
    )
    with pytest.raises(ValueError, match="Two arrays of the tree have the same path"):
        packing.flatten(_Twins(jnp.zeros(1), jnp.ones(1)))
