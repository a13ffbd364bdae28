"""Verdicts on claims: hand-made differences, and the rates of error of many looks."""

import itertools
import math

import numpy as np
import pytest

from sire_jax import claims
from sire_jax.claims import Claim, half_width, judge

CLAIM = Claim("aux", "bare", "accuracy", by=1.0, lower=False)


def _evidence(differences, mean):
    """The martingale itself, by its definition: a likelihood ratio mixed over effects."""
    number = len(differences)
    t = math.sqrt(number) * (np.mean(differences) - mean) / np.std(differences, ddof=1)
    r, free = 1 + number, number - 1
    return r**-0.5 * ((1 + t**2 / free) / (1 + t**2 / (r * free))) ** (number / 2)


@pytest.mark.parametrize("number", [5, 6, 10, 40])
def test_the_edges_of_an_interval_are_where_the_evidence_is_twenty(number):
    differences = np.random.default_rng(number).normal(0.3, 2, number)
    half = half_width(differences.std(ddof=1), number)
    for edge in (differences.mean() - half, differences.mean() + half):
        assert _evidence(differences, edge) == pytest.approx(20, rel=1e-9)


def test_intervals_shrink_with_seeds_and_widen_with_certainty():
    widths = [half_width(1.0, n) for n in range(5, 200)]
    assert all(a > b for a, b in itertools.pairwise(widths))
    assert widths[-1] == pytest.approx(math.sqrt(math.log(20**2 * 200) / 199), rel=0.05)
    assert half_width(1.0, 20, 0.01) > half_width(1.0, 20, 0.05)
    assert half_width(3.0, 20) == pytest.approx(3 * half_width(1.0, 20))
    assert [half_width(1.0, n) for n in (1, 4)] == [math.inf] * 2


@pytest.mark.parametrize(
    ("mean", "verdict"),
    [(1.1, "confirmed"), (0.4, "smaller"), (-0.3, "refuted"), (-2.0, "refuted")],
)
def test_a_mean_that_is_known_well_is_judged_by_where_it_lies(mean, verdict):
    spread = np.tile([-0.01, 0.01], 10)
    judged = judge(CLAIM, mean + spread)
    assert judged.verdict == verdict
    assert judged.decided
    assert judged.mean == pytest.approx(mean)
    assert judged.low < mean < judged.high
    assert (judged.seeds, judged.needed) == (20, None)


def test_what_is_below_the_papers_but_may_be_something_goes_on():
    spread = np.tile([-0.01, 0.01], 10)
    judged = judge(CLAIM, 0.002 + spread)
    assert judged.verdict == "less, maybe none"
    assert not judged.decided
    assert half_width(np.std(spread, ddof=1), judged.needed) < 0.002
    # A figure of another setting is never a reason to stop.
    assert judge(CLAIM, [0.25, 0.2, 0.3, -0.1, 0.1]).verdict == "less, maybe none"


def test_a_seed_without_a_figure_ends_a_claim():
    judged = judge(CLAIM, [1.0, math.nan, 1.0, 1.0, 1.0, 1.0])
    assert (judged.verdict, judged.decided, judged.seeds) == ("diverged", True, 6)


def test_what_is_not_known_is_undecided_and_says_how_many_seeds_it_may_take():
    judged = judge(CLAIM, [2.0, -1.0, 0.5, 1.0, -0.5, 1.5])
    assert judged.verdict == "undecided"
    assert judged.low < 0 < 1 < judged.high
    half = half_width(np.std([2.0, -1.0, 0.5, 1.0, -0.5, 1.5], ddof=1), judged.needed)
    before = half_width(np.std([2.0, -1.0, 0.5, 1.0, -0.5, 1.5], ddof=1), judged.needed - 1)
    # The mean is 0.58: the interval leaves 0 first.
    assert half < judged.mean < before
    for few in ([], [1.0]):
        assert judge(CLAIM, few).verdict == "undecided"
        assert judge(CLAIM, few).needed is None


@pytest.mark.parametrize("deviation", [0.5, 1.5])
@pytest.mark.parametrize(
    ("effect", "wrong"),
    [(0.0, {"confirmed", "smaller", "refuted"}), (1.0, {"smaller", "less, maybe none", "refuted"})],
)
def test_verdicts_of_a_thousand_claims_are_wrong_less_often_than_promised(effect, wrong, deviation):
    generator = np.random.default_rng(7)
    errors = right = 0
    for _ in range(1000):
        differences = generator.normal(effect, deviation, 40)
        # A look after every seed, and each of them may be the last.
        verdicts = [judge(CLAIM, differences[:n]).verdict for n in range(2, 41)]
        errors += bool(wrong & set(verdicts))
        right += verdicts[-1] == ("confirmed" if effect else "less, maybe none")
    # 0.05, and three standard errors of a thousand.
    assert errors / 1000 < 0.05 + 3 * 0.0069
    # It decides, too: nearly always where seeds do little.
    assert right / 1000 > (0.9 if deviation == 0.5 else 0.4)


def test_intervals_hold_the_mean_at_all_looks_together():
    generator = np.random.default_rng(3)
    missed = 0
    for _ in range(1000):
        differences = generator.normal(0.7, 2.0, 60)
        looks = (judge(CLAIM, differences[:n]) for n in range(5, 61))
        missed += any(not look.low <= 0.7 <= look.high for look in looks)
    assert missed / 1000 < 0.05 + 3 * 0.0069


# ---- Claims of tables.

TABLE = {
    "columns": {
        "accuracy": {"split": "test", "metric": "main/top_1", "percent": True},
        "error": {"split": "test", "metric": "main/top_1", "error_percent": True},
        "size": {"parameters": True},
    },
    "claims": [{"row": "aux", "better_than": "bare", "column": "error", "by": 0.68}],
}


def test_claims_are_read_with_their_direction():
    (claim,) = claims.read(TABLE, ["aux", "bare"])
    assert claim == Claim("aux", "bare", "error", 0.68, lower=True)
    assert str(claim) == "aux better than bare, error"
    figures = {("aux", "error"): [29.0, 28.0, 27.0], ("bare", "error"): [30.0, 30.0]}
    assert claim.differences(figures) == [1.0, 2.0]
    assert claim.differences({("aux", "error"): [29.0]}) == []


def test_a_claim_may_be_of_two_columns_and_without_a_figure():
    section = {"row": "aux", "better_than": "aux", "column": "top", "than_column": "main"}
    columns = {name: {"metric": f"{name}/top_1"} for name in ("top", "main")}
    (claim,) = claims.read({"columns": columns, "claims": [section]}, ["aux"])
    assert claim == Claim("aux", "aux", "top", 0.0, lower=False, than_column="main")
    assert str(claim) == "aux (top) better than aux (main)"
    figures = {("aux", "top"): [0.5, 0.7], ("aux", "main"): [0.25, 0.75]}
    assert claim.differences(figures) == pytest.approx([0.25, -0.05])


@pytest.mark.parametrize(
    ("mean", "verdict"), [(0.5, "confirmed"), (-0.5, "refuted"), (0.0, "undecided")]
)
def test_a_claim_without_a_figure_is_judged_by_its_sign(mean, verdict):
    claim = Claim("aux", "bare", "accuracy", by=0.0, lower=False)
    assert judge(claim, mean + np.tile([-0.1, 0.1], 5)).verdict == verdict


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row": "axu"}, "should name two rows of the table and columns of metrics"),
        ({"column": "size"}, "should name two rows of the table and columns of metrics"),
        ({"column": "top"}, "should name two rows of the table and columns of metrics"),
        ({"than_column": "top"}, "should name two rows of the table and columns of metrics"),
        ({"by": 0.0}, "has by 0.0; it should be above 0, or left out where the paper has no"),
        ({"by": "1"}, "has by 1; it should be above 0"),
        ({"by": True}, "has by True; it should be above 0"),
        ({"row": "bare"}, "should compare two figures, both of which should be errors or neither"),
        ({"than_column": "accuracy"}, "should compare two figures, both of which should be errors"),
        ({"more": 1}, "should have 'row', 'better_than' and 'column', and may have 'by',"),
    ],
)
def test_claims_that_can_not_be_judged_are_refused(changes, message):
    columns = {**TABLE["columns"], "accuracy": {"split": "test", "metric": "main/top_1"}}
    table = {"columns": columns, "claims": [{**TABLE["claims"][0], **changes}]}
    with pytest.raises(ValueError, match=message):
        claims.read(table, ["aux", "bare"])


def test_a_table_without_claims_says_so():
    with pytest.raises(ValueError, match="has no claims to decide"):
        claims.read({**TABLE, "claims": []}, ["aux", "bare"])
