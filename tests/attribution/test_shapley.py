"""Shapley values: what defines them, and samples of orders."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sire_jax.attribution import plan
from sire_jax.attribution.results import Attribution, Interval
from sire_jax.attribution.shapley import gains, interactions, orders, shapley, subsets

NAMES = ("a", "b", "c", "d")
numbers = st.floats(-10, 10)
games = st.integers(1, 4).flatmap(
    lambda size: st.lists(numbers, min_size=2**size, max_size=2**size)
)


def _game(values):
    names = NAMES[: len(values).bit_length() - 1]
    return dict(zip(subsets(names), map(np.asarray, values), strict=True)), names


@given(games)
def test_values_add_up_to_what_all_gain(values):
    game, names = _game(values)
    gained = game[frozenset(names)] - game[frozenset()]
    assert sum(shapley(game).values()) == pytest.approx(gained, abs=1e-9)


@given(games, games)
def test_values_of_a_sum_of_games_are_sums(first, second):
    game, _ = _game(first)
    other, _ = _game((second * 16)[: len(first)])
    both = shapley({s: game[s] + other[s] for s in game})
    a, b = shapley(game), shapley(other)
    assert both == pytest.approx({k: a[k] + b[k] for k in a}, abs=1e-9)


@given(st.lists(numbers, min_size=4, max_size=4))
def test_in_a_game_without_interaction_each_is_worth_what_it_adds(added):
    worth = dict(zip(NAMES, added, strict=True))
    game = {s: np.asarray(sum(worth[n] for n in s)) for s in subsets(NAMES)}
    assert shapley(game) == pytest.approx(worth, abs=1e-9)
    assert list(interactions(game).values()) == pytest.approx([0] * 6, abs=1e-9)


def test_two_that_are_worth_something_only_together_interact():
    game = {s: np.asarray(float({"a", "b"} <= s)) for s in subsets(("a", "b", "c"))}
    assert shapley(game) == pytest.approx({"a": 0.5, "b": 0.5, "c": 0})
    assert interactions(game) == pytest.approx({("a", "b"): 1, ("a", "c"): 0, ("b", "c"): 0})


def test_values_of_several_seeds_are_each_their_own():
    game = {s: np.asarray([len(s), 2.0 * len(s)]) for s in subsets(NAMES)}
    np.testing.assert_allclose(shapley(game)["c"], [1, 2])
    np.testing.assert_allclose(interactions(game)["a", "d"], [0, 0], atol=1e-12)


@given(games)
@settings(max_examples=20)
def test_gains_in_all_orders_are_the_shapley_values(values):
    game, names = _game(values)
    everything = list(itertools.permutations(names))
    assert gains(everything, game) == pytest.approx(shapley(game), abs=1e-9)


def test_drawn_orders_come_with_their_reverses_and_estimate_without_bias():
    drawn = orders(NAMES, 3, seed=1)
    assert [order[::-1] for order in drawn[::2]] == drawn[1::2]
    assert all(sorted(order) == list(NAMES) for order in drawn)
    assert drawn == orders(NAMES, 3, seed=1)
    generator = np.random.default_rng(0)
    game = {s: np.asarray(generator.normal()) for s in subsets(NAMES)}
    estimates = [gains(orders(NAMES, 1, seed), game) for seed in range(400)]
    for name, value in shapley(game).items():
        samples = [each[name] for each in estimates]
        error = np.std(samples) / 20
        assert abs(np.mean(samples) - value) < 4 * error
    # A pair of an order and its reverse knows a game of two whole.
    assert gains(orders(("a", "b"), 1, 0), game) == pytest.approx(
        shapley({s: game[s] for s in subsets(("a", "b"))})
    )


# ---- From figures to a table.


def test_the_interval_is_students():
    found = Interval.of([0.5, 0.7, 0.6, 0.9])
    # 3.182 is t at 97.5% of three degrees of freedom, 0.0854 the standard error.
    assert (found.mean, found.seeds) == (pytest.approx(0.675), 4)
    assert found.high - found.mean == pytest.approx(3.182 * 0.08539, rel=1e-3)
    assert Interval.of([0.5]) == Interval(0.5, -np.inf, np.inf, 1)


def test_figures_of_all_subsets_become_a_table():
    # Of none, "a", "b", both, and the control.
    measured = {0: [0.5, 0.6, 0.5, 0.7, 0.52], 1: [0.5, 0.6, 0.5, 0.7, 0.48]}
    found = plan.collect("main/top_1", ("a", "b"), 0, measured)
    assert found.values == {"": [0.5] * 2, "a": [0.6] * 2, "b": [0.5] * 2, "a+b": [0.7] * 2}
    assert found.worth == {"a": pytest.approx([0.15] * 2), "b": pytest.approx([0.05] * 2)}
    assert found.pairs == {"a+b": pytest.approx([0.1] * 2)}
    lines = str(found).splitlines()
    assert lines[2].split("|")[1:3] == [" main output alone                          ", " 0.5000  "]
    assert "+0.1500 | +0.1500 to +0.1500 | 2" in lines[3]
    assert "a+b, together beyond each" in lines[5]
    assert "+0.2000" in lines[6]
    # 0.02 either way: twelve standard deviations of t at one degree of freedom.
    assert "+0.0000 | -0.2541 to +0.2541" in lines[7]


def test_of_one_seed_there_is_no_interval():
    found = plan.collect("main/top_1", ("a",), 0, {3: [0.5, 0.6, 0.5]})
    assert found.pairs == {}
    assert "| +0.1000 | unknown of one seed | 1" in str(found)


def test_figures_of_drawn_orders_become_estimates():
    count, names = 2, tuple("abcdefg")
    networks, drawn = plan.networks(names, count, seed=5)
    assert len(networks) == 2 + 2 * count * 6
    assert len(drawn) == 2 * count
    # Each adds its place in the alphabet, in any order.
    values = [float(sum(map(names.index, subset))) for subset in networks]
    found = plan.collect("main/top_1", names, count, {5: [*values, 0.0]})
    assert isinstance(found, Attribution)
    assert found.sampled
    assert found.worth == {name: [i] for i, name in enumerate(names)}
    assert found.pairs == {}


def test_small_sets_are_exact_and_large_ones_samples():
    assert plan.orders_for("abcdef", None) == 0
    assert plan.orders_for("abcdefg", None) == plan.ORDERS
    assert plan.orders_for("abcdefg", 0) == 0
    with pytest.raises(ValueError, match=r"sample is -1; it should be at least 0"):
        plan.orders_for("ab", -1)


def test_the_control_has_all_weights_on_the_main_objective():
    factors = plan.effective_factors({"exit": 0.3, "main": 0.5, "late": 0.2}, "main")
    assert factors == {"exit": 0, "late": 0, "main": pytest.approx(2)}
