import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sire_jax import registry
from sire_jax.updates import AGGREGATORS
from sire_jax.updates.aggregators import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    NashMTL,
    PCGrad,
    Sum,
    UPGrad,
)
from sire_jax.updates.correction import RIDGE, Cosines, smallest_correction

KEY = jax.random.key(0)
CONFLICT = [[2.0, 0], [-1, 1]]
ROOT_2 = math.sqrt(2)


@functools.cache
def _compiled(aggregator):
    return jax.jit(aggregator)


def _coefficients(aggregator, gradients, key=KEY):
    gradients = np.asarray(gradients, np.float32)
    gramian = jnp.asarray(gradients @ gradients.T)
    return np.asarray(_compiled(aggregator)(gramian, key))


def _diagonal(*norms):
    return np.diag(np.asarray(norms, np.float32))


# By hand; in CONFLICT g_1 . g_2 = -2, |g_1|^2 = 4 and |g_2|^2 = 2.
BY_HAND = [
    (Sum(), CONFLICT, [1, 1]),
    # p_1 = g_1 + g_2 = (1, 1); p_2 = g_2 + g_1 / 2 = (0, 1).
    (PCGrad(), CONFLICT, [1.5, 2]),
    (UPGrad(), CONFLICT, [1.5, 2]),
    # d = (0.2, 0.6), and d . g_1 = d . g_2 = |d|^2 = 0.4.
    (MGDA(), CONFLICT, [0.4, 0.6]),
    # g_0 = (1, 1); g_2 gains least on the whole ball, so d = g_0 + 1/4 sqrt(2) g_2 / sqrt(2).
    (CAGrad(0.25), CONFLICT, [1, 1.25]),
    # d = (0.7, 2.1), where both gain 1.4 and |d - g_0|^2 = 0.09 + 1.21 = 1.3 = r^2 |g_0|^2.
    (CAGrad(math.sqrt(0.65)), CONFLICT, [1.4, 2.1]),
    (CAGrad(0.0), CONFLICT, [1, 1]),
    # 3 a - 1 = (2 - 4 a) / sqrt(2) for c = (a, 1 - a).
    (IMTLG(), CONFLICT, [ROOT_2 - 1, 2 - ROOT_2]),
    # 4 a^2 - 2 a b = 1 = 2 b^2 - 2 a b, so b = sqrt(2) a.
    (NashMTL(), CONFLICT, np.array([1, ROOT_2]) / math.sqrt(4 - 2 * ROOT_2)),
    # Singular values 2 and 1 along v = (0.6, 0.8) and w = (-0.8, 0.6): c = 0.5 1.4 v - 0.2 w.
    (AlignedMTL(), [[1.2, -0.8], [1.6, 0.6]], [0.58, 0.44]),
    # g_3 = (1, 1) conflicts with neither: p_1 = (0.5, 0.5), p_2 = (0, 1), p_3 = g_3.
    (UPGrad(), [[1, 0], [-1, 1], [1, 1]], [2, 1.5, 1]),
    (PCGrad(), [[1, 0], [-1, 1], [1, 1]], [2, 1.5, 1]),
    # Orthogonal gradients weigh 1 / |g|^2; a long one inside the others' cone weighs nothing.
    (MGDA(), _diagonal(1, 1, 2), [4 / 9, 4 / 9, 1 / 9]),
    (MGDA(), [[1, 0], [0, 1], [3, 3]], [0.5, 0.5, 0]),
    # g_0 = (2, 1, 1): gains 4, 1, 1; d = (2, 1 + t, 1 + t) with 2 t^2 = 0.25 |g_0|^2 = 1.5.
    (CAGrad(0.5), _diagonal(2, 1, 1), [1, 1 + math.sqrt(0.75), 1 + math.sqrt(0.75)]),
    (IMTLG(), _diagonal(1, 2, 4), [4 / 7, 2 / 7, 1 / 7]),
    (NashMTL(), _diagonal(1, 2, 4), [1, 0.5, 0.25]),
    (NashMTL(), [[3, 4]] * 3, [1 / (5 * math.sqrt(3))] * 3),
    (AlignedMTL(), _diagonal(1, 2, 4), [1, 0.5, 0.25]),
    (Sum(), _diagonal(1, 2, 4), [1, 1, 1]),
]


@pytest.mark.parametrize(
    ("aggregator", "gradients", "expected"),
    BY_HAND,
    ids=[f"{type(a).__name__}-{len(g)}-{i}" for i, (a, g, _) in enumerate(BY_HAND)],
)
def test_coefficients_by_hand(aggregator, gradients, expected):
    found = _coefficients(aggregator, gradients)
    np.testing.assert_allclose(found, expected, rtol=5e-5, atol=1e-5)


@pytest.mark.parametrize("aggregator", [Sum(), PCGrad(), UPGrad()])
def test_without_conflict_the_gradients_are_summed(aggregator):
    assert _coefficients(aggregator, [[1, 0.2], [0, 3], [2, 2]]).tolist() == [1, 1, 1]


def _pcgrad(gradients, orders):
    total = 0
    for i, order in enumerate(orders):
        projected = gradients[i]
        for j in order:
            product = min(projected @ gradients[j], 0)
            projected = projected - product / (gradients[j] @ gradients[j]) * gradients[j]
        total = total + projected
    return total


def test_pcgrad_projects_in_random_orders():
    gradients = np.asarray([[1.0, 0, 0.5], [-1, 1, 0.3], [-0.5, -1.5, 1]])
    others = [list(itertools.permutations({0, 1, 2} - {i})) for i in range(3)]
    known = [_pcgrad(gradients, orders) for orders in itertools.product(*others)]
    seen = set()
    for seed in range(12):
        found = _coefficients(PCGrad(), gradients, jax.random.key(seed)) @ gradients
        distances = [float(np.abs(found - each).max()) for each in known]
        assert min(distances) < 1e-5
        seen.add(int(np.argmin(distances)))
    assert len(seen) > 1
    again = [_coefficients(PCGrad(), gradients, jax.random.key(3)) for _ in range(2)]
    np.testing.assert_array_equal(*again)


SOLVED = [PCGrad(), UPGrad(), MGDA(), CAGrad(), IMTLG(), NashMTL(), AlignedMTL()]
DETERMINISTIC = [each for each in SOLVED if not isinstance(each, PCGrad)]
# How the coefficients grow if all gradients are multiplied by s: s to this power.
POWERS = {NashMTL: -1}

examples = settings(max_examples=25, deadline=None, derandomize=True)
# Four of six dimensions, of norms from 0.1 to 10.
RANDOM = st.integers(0, 2**32 - 1).map(
    lambda seed: (
        np.random.default_rng(seed).normal(size=(4, 6))
        * 10 ** np.random.default_rng(seed + 1).uniform(-1, 1, size=(4, 1))
    ).astype(np.float32)
)
# Zeros, repeated, opposite and dependent gradients.
DEGENERATE = st.lists(
    st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=4, max_size=4
).map(lambda rows: np.asarray(rows, np.float32))


def _lengths(gradients):
    return np.linalg.norm(gradients, axis=1)


@examples
@given(gradients=st.one_of(RANDOM, DEGENERATE))
def test_upgrad_conflicts_with_no_gradient(gradients):
    coefficients = _coefficients(UPGrad(), gradients)
    assert (coefficients >= 1).all()
    gains = gradients @ (coefficients @ gradients)
    assert (gains >= -2e-3 * _lengths(gradients) * _lengths(gradients).sum()).all()


@examples
@given(gradients=RANDOM)
def test_upgrad_projects_each_gradient(gradients):
    # Of all p_i = g_i + J' u with u >= 0, the nearest: (G v)_k u_k = 0.
    gramian = gradients.astype(np.float64) @ gradients.T
    norms = _lengths(gradients)
    matrix = jnp.asarray((gramian / np.outer(norms, norms)).astype(np.float32))
    for i in range(4):
        found = _corrected(matrix, matrix[i], 0.0)
        gains = np.asarray(matrix[i] + matrix @ found)
        assert (np.asarray(found) >= 0).all()
        assert gains.min() >= -1e-4
        assert np.abs(gains * found).max() < 1e-3


@jax.jit
def _corrected(matrix, agreement, level):
    regular = matrix + RIDGE * jnp.eye(len(matrix), dtype=jnp.float32)
    return smallest_correction(regular, agreement, jnp.ones_like(agreement), level, jnp.inf).amounts


@examples
@given(gradients=st.one_of(RANDOM, DEGENERATE))
def test_mgda_is_the_shortest_vector_of_the_hull(gradients):
    coefficients = _coefficients(MGDA(), gradients)
    present = _lengths(gradients) > 0
    assert (coefficients >= 0).all()
    assert coefficients.sum() == pytest.approx(float(present.any()), abs=1e-5)
    assert (coefficients[~present] == 0).all()
    if not present.any():
        return
    shortest = coefficients @ gradients
    gradients = gradients[present]
    assert np.linalg.norm(shortest) <= _lengths(gradients).min() * (1 + 1e-4) + 1e-6
    slack = 2e-3 * _lengths(gradients).max() ** 2
    assert (gradients @ shortest >= shortest @ shortest - slack).all()


@examples
@given(gradients=RANDOM)
def test_cagrad_is_the_best_of_its_ball(gradients):
    extra = _coefficients(CAGrad(), gradients).astype(np.float64) - 1
    center = gradients.sum(0)
    radius = 0.5 * np.linalg.norm(center)
    assert np.linalg.norm(extra @ gradients) == pytest.approx(radius, rel=1e-3)
    # The dual's value at the hull's vector that d - g_0 points to bounds what any d can gain.
    hull = extra @ gradients / extra.sum()
    bound = hull @ center + radius * np.linalg.norm(hull)
    gained = (gradients @ (center + extra @ gradients)).min()
    assert bound - gained < 2e-4 * np.linalg.norm(center) * np.linalg.norm(hull) + 1e-5


@examples
@given(gradients=RANDOM)
def test_imtl_g_projects_equally_on_all_gradients(gradients):
    coefficients = _coefficients(IMTLG(), gradients)
    assert coefficients.sum() == pytest.approx(1, abs=1e-3 * float(np.abs(coefficients).max()))
    projections = gradients @ (coefficients @ gradients) / _lengths(gradients)
    size = np.abs(coefficients) @ _lengths(gradients)
    np.testing.assert_allclose(projections, projections[0], atol=1e-4 * size)


@examples
@given(gradients=RANDOM)
def test_nash_mtl_is_the_bargaining_solution(gradients):
    coefficients = _coefficients(NashMTL(), gradients)
    assert (coefficients > 0).all()
    aggregated = coefficients @ gradients
    np.testing.assert_allclose(gradients @ aggregated * coefficients, 1, rtol=5e-3)
    assert aggregated @ aggregated == pytest.approx(4, rel=2e-3)


@examples
@given(gradients=RANDOM)
def test_aligned_mtl_sums_orthogonal_gradients(gradients):
    values, vectors = np.linalg.eigh(gradients.astype(np.float64) @ gradients.T)
    aligned = math.sqrt(values[0]) * vectors @ np.diag(values**-0.5) @ vectors.T @ gradients
    np.testing.assert_allclose(aligned @ aligned.T, values[0] * np.eye(4), atol=1e-6 * values[0])
    found = _coefficients(AlignedMTL(), gradients) @ gradients
    # The smallest singular value is known to the rounding of the largest.
    rounding = 3e-6 * values[-1] / values[0]
    np.testing.assert_allclose(found, aligned.sum(0), atol=(rounding + 1e-5) * 2 * values[0] ** 0.5)


@examples
@given(gradients=RANDOM, order=st.permutations(range(4)))
@pytest.mark.parametrize("aggregator", DETERMINISTIC, ids=lambda each: type(each).__name__)
def test_the_order_of_the_gradients_does_not_matter(aggregator, gradients, order):
    found = _coefficients(aggregator, gradients)
    permuted = _coefficients(aggregator, gradients[list(order)])
    np.testing.assert_allclose(permuted, found[list(order)], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("aggregator", SOLVED, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1e6])
def test_coefficients_scale_with_the_gradients(aggregator, scale):
    gradients = np.asarray([[1, 2, 0, 1], [-1, 1, 0.5, 0], [0, -1, 1, 0.2]], np.float32)
    found = _coefficients(aggregator, gradients * np.float32(scale))
    expected = _coefficients(aggregator, gradients) * scale ** POWERS.get(type(aggregator), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("aggregator", [IMTLG(), NashMTL()])
def test_scaling_one_gradient_does_not_turn_the_aggregate(aggregator):
    gradients = np.asarray([[1, 2, 0, 1], [-1, 1, 0.5, 0], [0, -1, 1, 0.2]], np.float32)
    scaled = gradients * np.asarray([[1e-4], [1], [300]], np.float32)
    found = [_coefficients(aggregator, each) @ each for each in (gradients, scaled)]
    directions = [each / np.linalg.norm(each) for each in found]
    np.testing.assert_allclose(*directions, atol=1e-4)


@pytest.mark.parametrize("aggregator", [Sum(), *SOLVED], ids=lambda each: type(each).__name__)
def test_any_gramian_has_finite_coefficients(aggregator):
    count = 10
    base = np.random.default_rng(0).normal(size=(count, 12)).astype(np.float32)
    cases = {"random": base, "none": base * 0, "identical": np.tile(base[:1], (count, 1))}
    cases["one of zeros"] = base * np.r_[0, np.ones(count - 1)].astype(np.float32)[:, None]
    cases["opposite"] = np.concatenate([base[:-1], -base[:1]])
    cases["wide"] = base * np.logspace(-8, 8, count, dtype=np.float32)[:, None]
    for name, gradients in cases.items():
        for scale in (1e-12, 1.0, 1e12):
            found = _coefficients(aggregator, gradients * np.float32(math.sqrt(scale)))
            assert np.isfinite(found).all(), (name, scale, found)
            assert np.isfinite(found @ gradients).all()


FOUR = np.random.default_rng(5).normal(size=(4, 6)).astype(np.float32) * [[1], [0.5], [2], [1]]
LEFT_OUT = [
    *((aggregator, CONFLICT) for aggregator in SOLVED),
    *((aggregator, FOUR) for aggregator in DETERMINISTIC),
]


@pytest.mark.parametrize(
    ("aggregator", "gradients"), LEFT_OUT, ids=[f"{type(a).__name__}-{len(g)}" for a, g in LEFT_OUT]
)
def test_a_gradient_of_zeros_is_left_out(aggregator, gradients):
    alone = _coefficients(aggregator, gradients)
    for i in range(len(gradients) + 1):
        padded = _coefficients(aggregator, np.insert(np.asarray(gradients), i, 0, axis=0))
        np.testing.assert_allclose(np.delete(padded, i), alone, rtol=5e-5, atol=1e-6)
        own = 1 if isinstance(aggregator, PCGrad | CAGrad | UPGrad) else 0
        assert padded[i] == pytest.approx(own, abs=1e-6)


@pytest.mark.parametrize("aggregator", SOLVED, ids=lambda each: type(each).__name__)
def test_of_several_gradients_of_zeros_nothing_is_asked(aggregator):
    found = _coefficients(aggregator, [[0, 0], [2, 0], [0, 0], [-1, 1]])
    np.testing.assert_allclose(found[[1, 3]], _coefficients(aggregator, CONFLICT), rtol=2e-5)
    only = _coefficients(aggregator, [[0, 0], [3, 4]])
    assert only[1] == pytest.approx(_coefficients(aggregator, [[3, 4]])[0], rel=1e-4)


def test_a_gradient_of_zeros_leaves_pcgrad_one_of_its_orders():
    gradients = np.asarray([[1.0, 0, 0.5], [-1, 1, 0.3], [-0.5, -1.5, 1]])
    others = [list(itertools.permutations({0, 1, 2} - {i})) for i in range(3)]
    known = [_pcgrad(gradients, orders) for orders in itertools.product(*others)]
    padded = np.insert(gradients, 1, 0, axis=0)
    for seed in range(4):
        found = _coefficients(PCGrad(), padded, jax.random.key(seed)) @ padded
        assert min(np.abs(found - order).max() for order in known) < 1e-5


@pytest.mark.parametrize("aggregator", [UPGrad(), MGDA()])
def test_opposite_gradients_stand_still(aggregator):
    gradients = np.asarray([[1, 2], [-2, -4]], np.float32)
    found = _coefficients(aggregator, gradients) @ gradients
    np.testing.assert_allclose(found, 0, atol=1e-4)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_compiled_and_mapped_as_one_by_one(name):
    aggregator = AGGREGATORS[name]()
    gradients = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    gramians = jnp.asarray(np.einsum("bki,bji->bkj", gradients, gradients))
    keys = jax.random.split(KEY, 3)
    mapped = jax.jit(jax.vmap(aggregator))(gramians, keys)
    assert mapped.dtype == jnp.float32
    for i in range(3):
        single = _compiled(aggregator)(gramians[i], keys[i])
        np.testing.assert_allclose(mapped[i], single, rtol=1e-4)
    np.testing.assert_allclose(aggregator(gramians[0], keys[0]), mapped[0], rtol=1e-4)


def test_cosines_of_long_and_short_gradients():
    gradients = np.asarray([[3e6, 4e6], [2e-6, 0], [0, 0]], np.float32)
    cosines = Cosines.of(jnp.asarray(gradients @ gradients.T))
    np.testing.assert_allclose(cosines.matrix, [[1, 0.6, 0], [0.6, 1, 0], [0, 0, 1]], rtol=1e-6)
    np.testing.assert_allclose(cosines.norms, [1, 4e-13, 0], rtol=1e-6)
    np.testing.assert_allclose(cosines.longest, 5e6, rtol=1e-6)


def test_a_correction_ends_at_its_level_or_at_its_length():
    # Orthogonal gradients: z_k = l - b_k above b_k; the path starts at l = -1 and bends at 0.5.
    matrix, agreement, demand = jnp.eye(2), jnp.asarray([-1, 0.5]), jnp.ones(2)
    endless = math.inf

    @jax.jit
    def correct(level, length):
        return smallest_correction(matrix, agreement, demand, level, length).amounts

    np.testing.assert_allclose(correct(-2.0, endless), [0, 0])
    np.testing.assert_allclose(correct(0.0, endless), [1, 0], rtol=1e-6)
    np.testing.assert_allclose(correct(1.5, endless), [2.5, 1], rtol=1e-6)
    np.testing.assert_allclose(correct(endless, 0.75), [0.75, 0], rtol=1e-6)
    # (l + 1)^2 + (l - 0.5)^2 = 4.5 at l = 1.
    np.testing.assert_allclose(correct(endless, math.sqrt(6.25 - 2)), [2, 0.5], rtol=1e-6)
    np.testing.assert_allclose(correct(1.5, 0.75), [0.75, 0], rtol=1e-6)


def test_aggregators_are_made_by_name():
    section = registry.describe(AGGREGATORS, "cagrad", "aggregator", radius=0.2)
    assert registry.create(AGGREGATORS, section, "aggregator") == CAGrad(0.2)
    with pytest.raises(ValueError, match=r"no aggregator 'upgrade'\. Did you mean 'upgrad'"):
        registry.choose(AGGREGATORS, "upgrade", "aggregator")


@pytest.mark.parametrize("radius", [-0.1, math.inf, math.nan])
def test_a_radius_is_at_least_0(radius):
    with pytest.raises(ValueError, match=f"radius is {radius}; it should be at least 0"):
        CAGrad(radius)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_what_is_no_gramian_is_refused(name):
    with pytest.raises(ValueError, match=r"A Gramian is \(2, 3\); it should be \[k, k\]"):
        AGGREGATORS[name]()(jnp.ones((2, 3)), KEY)
