import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sire_jax.storage import trees
from sire_jax.storage.trees import ArrayType


def test_arrays_are_listed_by_path():
    listed = trees.flatten({"b": [jnp.zeros(1), None], "a": (3, {})})
    assert list(listed) == ["a/0", "b/0"]
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
        trees.flatten(_Twins(jnp.zeros(1), jnp.ones(1)))
    with pytest.raises(ValueError, match="Two arrays of the tree have the same path"):
        trees.flatten({"a/b": jnp.zeros(1), "a": {"b": jnp.ones(1)}})
    # Others of orbax's, whose paths are joined with dots.
    with pytest.raises(ValueError, match=r"the same path: a/b\.c and a\.b/c\."):
        trees.flatten({"a": {"b.c": jnp.zeros(1)}, "a.b": {"c": jnp.ones(1)}})


def test_a_tree_is_nested_by_what_a_person_calls_its_nodes():
    state = optax.trace(0.9).init({"kernel": jnp.ones(2)})
    tree = {"steps": (state, None, 3), "left out": 4}
    numbers = trees.to_host({k: v for k, v in trees.flatten(tree).items() if k != "left out"})
    made = trees.nested(tree, numbers)
    assert list(made) == ["steps"]
    assert list(made["steps"]) == ["0", "2"]
    assert made["steps"]["0"]["trace"]["kernel"].tolist() == [0, 0]
    assert made["steps"]["2"].tolist() == 3


def test_numbers_are_copies_placed_like_arrays():
    key = jax.random.wrap_key_data(jnp.array([5, 6], jnp.uint32))
    columns = np.asfortranarray(np.array([[1, 2], [3, 4]], np.uint8))
    arrays = {"key": key, "columns": columns, "x": jnp.ones(2, jnp.bfloat16)}
    numbers = trees.to_host(arrays)
    columns[:] = 0
    assert {name: each.tolist() for name, each in numbers.items()} == {
        "key": [5, 6],
        "columns": [[1, 2], [3, 4]],
        "x": [1, 1],
    }
    for name, each in arrays.items():
        described = trees.numbers_of(each)
        assert (described.shape, described.dtype) == (numbers[name].shape, numbers[name].dtype)
    assert trees.placed_like(numbers["columns"], columns) is numbers["columns"]
    shape = jax.ShapeDtypeStruct((), key.dtype)
    assert jnp.array_equal(
        jax.random.normal(trees.placed_like(numbers["key"], shape)), jax.random.normal(key)
    )
    assert trees.placed_like(numbers["x"], arrays["x"]).dtype == jnp.bfloat16
