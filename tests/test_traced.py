import jax
import jax.numpy as jnp
import pytest
from jax import lax

from sire_jax import traced

X = jnp.ones(3)


def _marks(function, *args):
    """Which arguments, by position, each result depends on."""
    program = jax.make_jaxpr(function)(*args).jaxpr
    found = traced.dependencies(program, [1 << i for i in range(len(args))])
    return [{i for i in range(len(args)) if mark >> i & 1} for mark in found]


def _names(trees):
    return {name: {k for k, v in tree.items() if v} for name, tree in trees.items()}


def _params(*names):
    return {name: jnp.full(3, 0.5) for name in names}


def _read(function, params):
    return _names(traced.parameters_read(function, params))


def _reach(function, params):
    return _names(traced.reach(function, params))


def test_results_of_nested_calls_are_told_apart():
    @jax.jit
    def inner(a, b, c):
        return a * b, c + 1.0, jnp.zeros(3)

    @jax.jit
    def outer(a, b, c, d):
        first, second, third = inner(b, a, c)
        again, _, _ = inner(second, d, a)
        return first, second, third, again

    assert _marks(outer, X, X, X, X) == [{0, 1}, {2}, set(), {2, 3}]
    assert _marks(lambda a, b: (b, a, a + b, X), X, X) == [{1}, {0}, {0, 1}, set()]


def test_marks_are_sets_of_bits():
    program = jax.make_jaxpr(lambda a, b: (a * b, a, X))(X, X).jaxpr
    assert traced.dependencies(program, [0b101, 0b010]) == [0b111, 0b101, 0]


def test_shapes_are_no_dependency():
    def function(a, b):
        return jnp.zeros_like(a) + b, jnp.full(3, a.size, jnp.float32)

    assert _marks(function, X, X) == [{1}, set()]


def test_a_carry_is_followed_through_several_iterations():
    # A shift register: w is in the first place after the third iteration.
    def register(x, y, z, w):
        return lax.scan(lambda c, _: ((c[1], c[2], w), c[0]), (x, y, z), None, length=5)

    first, second, third, seen = _marks(register, X, X, X, X)
    assert 3 in first
    assert 0 not in first
    assert 3 in second
    assert not second & {0, 1}
    assert third == {3}
    assert seen == {0, 1, 2, 3}


def test_a_scan_keeps_separate_what_does_not_meet():
    def run(a, b, c, xs, unused):
        def body(carry, x):
            left, right = carry
            return (left * a, right + b + x), (left, c)

        (left, right), (lefts, cs) = lax.scan(body, (a, unused * 0.0), xs)
        return left, right, lefts, cs

    assert _marks(run, X, X, X, jnp.ones((4, 3)), X) == [{0}, {1, 3, 4}, {0}, {2}]


def test_a_scan_in_a_jit_in_a_scan_is_followed():
    def run(a, b, c):
        inner = jax.jit(lambda h: lax.scan(lambda h, _: (h + b, None), h, None, length=2)[0])
        return lax.scan(lambda h, _: (inner(h), c), a, None, length=2)

    assert _marks(run, X, X, X) == [{0, 1}, {2}]


def test_conditionals_and_while_loops_depend_on_all_they_are_given():
    def choose(p, a, b, c):
        return lax.cond(p.sum() > 0, lambda: a, lambda: b), c

    assert _marks(choose, X, X, X, X) == [{0, 1, 2}, {3}]

    def loop(limit, a, b, c):
        end = lax.while_loop(lambda s: s[0] < limit, lambda s: (s[0] + 1, s[1] * b), (0, a))
        return end[1], c

    assert _marks(loop, 3, X, X, X) == [{0, 1, 2}, {3}]


def test_outputs_of_any_structure_are_read_by_name():
    def function(p, x):
        return {"z": (p["a"] * x, [p["b"]]), "a": {"deep": p["c"] + x}, "none": x}

    found = traced.parameters_read(function, _params("a", "b", "c"), X)
    assert _names(found) == {"z": {"a", "b"}, "a": {"c"}, "none": set()}


def test_parameters_may_be_shapes_in_nested_trees():
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    params = {"layer": {"w": shape, "b": shape}, "list": [shape, shape]}
    found = traced.parameters_read(lambda p: {"y": p["layer"]["w"] + p["list"][1]}, params)
    assert found == {"y": {"layer": {"w": True, "b": False}, "list": [False, True]}}
    found = traced.reach(lambda p: {"y": (p["layer"]["b"] * p["list"][0]).sum()}, params)
    assert found == {"y": {"layer": {"w": False, "b": True}, "list": [True, False]}}


def test_a_loss_reaches_what_it_is_differentiable_in():
    def losses(p):
        return {
            "product": (p["a"] * p["b"]).sum(),
            "stopped": (p["b"] * lax.stop_gradient(p["c"])).sum(),
            "constant": jnp.asarray(3.0),
            "zero": (0.0 * p["d"]).sum(),
        }

    params = _params("a", "b", "c", "d", "unused")
    reached = {"product": {"a", "b"}, "stopped": {"b"}, "constant": set(), "zero": {"d"}}
    assert _reach(losses, params) == reached
    assert _read(losses, params) == {**reached, "stopped": {"b", "c"}}


def test_an_integer_path_is_read_and_not_reached():
    def losses(p):
        index = jnp.argmax(p["a"])
        rounded = p["b"].astype(jnp.int32).astype(jnp.float32)
        return {"l": p["c"][index] + rounded.sum()}

    params = _params("a", "b", "c")
    assert _read(losses, params) == {"l": {"a", "b", "c"}}
    assert _reach(losses, params) == {"l": {"c"}}


def test_reach_is_told_apart_inside_one_call():
    @jax.jit
    def both(a, b, shared):
        h = jnp.tanh(a * shared)
        return h.sum(), (b * lax.stop_gradient(h)).sum()

    def losses(p):
        first, second = jax.jit(both)(p["a"], p["b"], p["s"])
        return {"first": first, "second": second}

    assert _reach(losses, _params("a", "b", "s")) == {"first": {"a", "s"}, "second": {"b"}}


def test_reach_goes_back_through_a_scan():
    def losses(p):
        def body(carry, _):
            x, y, z = carry
            return (y * p["w"], jnp.sin(y) + z, z * p["v"]), (x * p["u"]).sum()

        start = (p["x"], X, X)
        (x, y, z), sums = lax.scan(body, start, None, length=4)
        return {"x": x.sum(), "y": y.sum(), "z": z.sum(), "sums": sums.sum()}

    found = _reach(losses, _params("u", "v", "w", "x"))
    # v is in x only by way of z and then y.
    assert found["z"] == {"v"}
    assert found["y"] == {"v"}
    assert found["x"] == {"v", "w"}
    assert found["sums"] == {"u", "v", "w", "x"}


def test_a_scan_that_stops_the_gradient_of_its_carry_reaches_the_last_step_only():
    def losses(p):
        def body(h, _):
            return lax.stop_gradient(h) * p["w"], None

        return {"l": lax.scan(body, p["start"], None, length=3)[0].sum()}

    params = _params("w", "start")
    assert _reach(losses, params) == {"l": {"w"}}
    assert _read(losses, params)["l"] >= {"w", "start"}


def test_checkpointed_blocks_are_transparent():
    @jax.checkpoint
    def block(a, b):
        h = jnp.sin(a * b)
        return h, jnp.cos(b)

    def losses(p):
        h, other = block(p["a"], p["b"])
        return {"h": (h * p["c"]).sum(), "other": other.sum()}

    params = _params("a", "b", "c", "d")
    expected = {"h": {"a", "b", "c"}, "other": {"b"}}
    assert _read(losses, params) == expected
    assert _reach(losses, params) == expected


def test_conditionals_are_reached_in_every_branch():
    def losses(p):
        chosen = lax.cond(p["p"].sum() > 0, lambda: p["a"] * 2, lambda: p["b"] * 3)
        return {"l": chosen.sum(), "other": p["c"].sum()}

    params = _params("p", "a", "b", "c")
    assert _read(losses, params) == {"l": {"p", "a", "b"}, "other": {"c"}}
    assert _reach(losses, params) == {"l": {"a", "b"}, "other": {"c"}}


def test_a_while_loop_is_read():
    def outputs(p):
        end = lax.while_loop(lambda h: h.sum() < 9, lambda h: h + p["a"], p["b"])
        return {"end": end, "c": p["c"]}

    assert _read(outputs, _params("a", "b", "c")) == {"end": {"a", "b"}, "c": {"c"}}


@jax.custom_vjp
def _straight_through(x, w):
    return jnp.round(x) * w


_straight_through.defvjp(
    lambda x, w: (_straight_through(x, w), w), lambda w, dy: (dy, jnp.zeros_like(w))
)


@jax.custom_jvp
def _half(x, w):
    return jnp.sin(x) * w, jnp.cos(w)


@_half.defjvp
def _half_jvp(primals, tangents):
    (x, w), (dx, _) = primals, tangents
    # Of the true derivative only the part by x.
    return _half(x, w), (jnp.cos(x) * w * dx, jnp.zeros(3))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_the_gradient_rules_of_ones_own_decide_what_is_reached(wrap):
    def losses(p):
        first, second = wrap(_half)(p["a"], p["b"])
        return {
            "rounded": wrap(_straight_through)(p["c"], p["d"]).sum(),
            "first": first.sum(),
            "second": second.sum(),
        }

    params = _params("a", "b", "c", "d")
    assert _reach(losses, params) == {"rounded": {"c"}, "first": {"a"}, "second": set()}
    expected = {"rounded": {"c", "d"}, "first": {"a", "b"}, "second": {"b"}}
    assert _read(losses, params) == expected


def _shape(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _conv(strides, groups=1):
    layout = ("NHWC", "HWIO", "NHWC")
    return lambda x, k: lax.conv_general_dilated(
        x, k, strides, "SAME", dimension_numbers=layout, feature_group_count=groups
    )


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (jnp.matmul, [(3, 4), (4, 5)], 3 * 4 * 5),
        (jnp.matmul, [(4,), (4,)], 4),
        (jnp.matmul, [(7, 3, 4), (7, 4, 5)], 7 * 3 * 4 * 5),
        (lambda a, b: jnp.einsum("abc,dbc->ad", a, b), [(2, 3, 4), (5, 3, 4)], 2 * 5 * 3 * 4),
        (lambda a, b: jax.jit(jnp.matmul)(a, b) @ b.T, [(3, 4), (4, 5)], 2 * 60),
        (_conv((1, 1)), [(2, 8, 6, 3), (3, 3, 3, 4)], 2 * 8 * 6 * 4 * 9 * 3),
        (_conv((2, 2)), [(2, 8, 6, 3), (3, 3, 3, 4)], 2 * 4 * 3 * 4 * 9 * 3),
        (_conv((1, 1), 2), [(1, 5, 5, 4), (3, 3, 2, 6)], 25 * 6 * 9 * 2),
        (_conv((1, 1), 4), [(1, 5, 5, 4), (3, 3, 1, 4)], 25 * 4 * 9),
        (jnp.add, [(3, 4), (3, 4)], 0),
    ],
)
def test_multiply_adds_of_products_and_convolutions(function, shapes, expected):
    assert traced.multiply_adds(function, *[_shape(*s) for s in shapes]) == expected


def test_a_loops_body_counts_as_often_as_it_runs():
    w = jnp.ones((3, 3))

    def scanned(x):
        return lax.scan(lambda h, _: (h @ w, None), x, None, length=4)[0]

    def nested(x):
        return lax.scan(lambda h, _: (scanned(h), None), x, None, length=5)[0]

    def looped(x):
        return lax.fori_loop(0, 6, lambda _, h: h @ w, x)

    def mapped(xs):
        return lax.map(lambda x: x @ w, xs)

    assert traced.multiply_adds(scanned, _shape(2, 3)) == 4 * 18
    assert traced.multiply_adds(nested, _shape(2, 3)) == 5 * 4 * 18
    assert traced.multiply_adds(looped, _shape(2, 3)) == 6 * 18
    assert traced.multiply_adds(mapped, _shape(7, 2, 3)) == 7 * 18


def test_dead_code_is_not_counted():
    def function(x):
        side = x @ x
        inner = jax.jit(lambda a: (a @ a, a + 1))
        product, plus = inner(x)
        del side, product
        carry, unused = lax.scan(lambda h, _: (h + 1, h @ h), plus, None, length=3)
        del unused
        return carry

    assert traced.multiply_adds(function, _shape(4, 4)) == 0
    assert traced.multiply_adds(lambda x: (function(x), x @ x), _shape(4, 4)) == 64


def test_of_a_conditional_the_most_expensive_branch_counts():
    def choose(i, x):
        branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
        return lax.switch(i, branches, x)

    def once_more(p, x):
        return lax.cond(p, lambda x: x @ x, lambda x: x, x) @ x

    assert traced.multiply_adds(choose, 0, _shape(4, 4)) == 2 * 64
    assert traced.multiply_adds(once_more, True, _shape(4, 4)) == 2 * 64


def test_rules_of_ones_own_and_checkpoints_are_counted_inside():
    product = jax.custom_vjp(jnp.dot)
    product.defvjp(lambda a, b: (a @ b, (a, b)), lambda ab, dy: (dy @ ab[1].T, ab[0].T @ dy))
    a, b = _shape(2, 3), _shape(3, 4)
    assert traced.multiply_adds(lambda a, b: product(a, b), a, b) == 24
    assert traced.multiply_adds(jax.checkpoint(jnp.matmul), a, b) == 24
    gradient = jax.grad(lambda a, b: (product(a, b) ** 2).sum(), (0, 1))
    assert traced.multiply_adds(gradient, a, b) == 3 * 24
    only_one = jax.grad(lambda a, b: product(a, b).sum())
    assert traced.multiply_adds(only_one, a, b) == 24


def test_size_counts_values_of_all_or_of_the_chosen():
    params = {"w": jnp.zeros((3, 4)), "b": _shape(4), "scalar": 1.0, "deep": [_shape(2, 2, 2)]}
    assert traced.size(params) == 12 + 4 + 1 + 8
    chosen = {"w": False, "b": True, "scalar": True, "deep": [False]}
    assert traced.size(params, chosen) == 5
    assert traced.size(params, {"w": True, "b": False, "scalar": False, "deep": [True]}) == 20
