"""Groups of labels by hand and beside exact arithmetic, and the program that makes them."""

import json
import re
from collections import Counter
from fractions import Fraction

import exiting
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sire_jax import configuration, grouping, groups, train
from sire_jax.data import sources
from sire_jax.groups import balanced, coarse, confusion, distances, mean_confusion, released
from sire_jax.inference import confusion as run_confusion
from sire_jax.job import command
from sire_jax.runs.trained import kept_weights, open_run
from sire_jax.storage.workdir import Workdir

# Counts of the labels a to f; a row's sum is 20, but of b 40, whose rates are those of 4, 12, …
HAND = np.array(
    [
        [11, 6, 1, 2, 0, 0],
        [8, 24, 6, 0, 2, 0],
        [0, 1, 14, 4, 0, 1],
        [1, 2, 5, 8, 3, 1],
        [1, 1, 2, 2, 9, 5],
        [0, 0, 1, 2, 2, 15],
    ]
)
# 40 (F + F^T) / 2 off the diagonal, such as ab: 20 (6/20 + 8/40) = 10; ad: 2 + 1; sums of rows on
# the right.
#      a   b   c   d   e   f
# a    .  10   1   3   1   0   15
# b   10   .   4   2   2   0   18
# c    1   4   .   9   2   2   18
# d    3   2   9   .   5   3   22
# e    1   2   2   5   .   7   17
# f    0   0   2   3   7   .   12
CONFUSED = np.array(
    [
        [0, 10, 1, 3, 1, 0],
        [10, 0, 4, 2, 2, 0],
        [1, 4, 0, 9, 2, 2],
        [3, 2, 9, 0, 5, 3],
        [1, 2, 2, 5, 0, 7],
        [0, 0, 2, 3, 7, 0],
    ]
)
OFF = ~np.eye(6, dtype=bool)


def test_distances_by_hand():
    for criterion, expected in (("join", 1 - CONFUSED / 40), ("split", CONFUSED / 40)):
        found = distances(HAND, criterion)
        np.testing.assert_allclose(found[OFF], expected[OFF], rtol=1e-14)
        np.testing.assert_array_equal(found, found.T)
        assert not found.diagonal().any()


def test_what_is_confused_is_joined_by_hand():
    # Three groups of two. The highest average distances are the least sums: f 12, a 15, e 17.
    # Of b, c, d the nearest to one of them is b to a (10), which fills that group; then d to e (5),
    # which fills that; c, which is confused with e as often as with f (2), is left for f.
    assert balanced(distances(HAND), 3, 0) == (0, 0, 1, 2, 2, 1)
    # Two groups of three: from f and a; b to a (10), e to f (7). Then the means are
    # c: {a, b} (1 + 4) / 2, {e, f} (2 + 2) / 2; d: {a, b} (3 + 2) / 2, {e, f} (5 + 3) / 2.
    # So d goes to {e, f} (4), which is then full, and c to {a, b}.
    assert balanced(distances(HAND), 2, 0) == (0, 0, 0, 1, 1, 1)


def test_what_is_confused_is_split_by_hand():
    # The highest average similarity: d 22, b 18, c 18. Of a, e, f the least similar to one of them
    # is f to b (0), then a to c (1; b is full), and e is left for d.
    assert balanced(distances(HAND, "split"), 3, 0) == (0, 1, 0, 2, 2, 1)


def test_the_released_program_fills_groups_unevenly_by_hand():
    # As with two balanced groups, but a group of 3 is not full at 1.1 * 6 / 2 = 3.3: to {d, e, f} c
    # is nearer, (9 + 2 + 2) / 3, than to {a, b}, 2.5.
    assert released(HAND, 2, 0) == (0, 0, 1, 1, 1, 1)
    # 1.1 * 6 / 3 = 2.2: c goes to {d, e}, (9 + 2) / 2, not to f (2), and it is full with three.
    assert released(HAND, 3, 0) == (0, 0, 1, 1, 1, 2)


def test_labels_that_do_not_divide_by_hand():
    # Five labels at 0, 1, 2, 10, 11 on a line, in two groups: the ends 0 (average 6) and 11 (8.25)
    # would be 24/4 and 33/4; 10 has 29/4. So the groups start with 11 and 10, and one takes three.
    places = np.array([0, 1, 2, 10, 11])
    line = np.abs(places[:, None] - places)
    # 2 to 10 (8), 1 to 10: {2, 10} is (1 + 9) / 2 = 5, nearer than 11 (10): one group of three.
    # The other may then only have two, and 0 goes to 11.
    assert balanced(line, 2, 0) == (0, 1, 1, 1, 0)


# ---- Beside exact arithmetic.


def _exactly(matrix, number, size, larger, seed):
    """The same algorithm, slowly, on fractions, with the same draws."""
    count, generator = len(matrix), np.random.default_rng(seed)
    averages = [sum(row[j] for j in range(count) if j != i) for i, row in enumerate(matrix)]
    least = sorted(averages)[-number]
    above = [i for i in range(count) if averages[i] > least]
    tied = [i for i in range(count) if averages[i] == least]
    drawn = generator.choice(tied, number - len(above), replace=False)
    members = [[i] for i in sorted([*above, *drawn.tolist()])]
    for _ in range(count - number):
        taken = {i for each in members for i in each}
        grown = sum(len(each) > size for each in members)
        pairs = {
            (i, k): Fraction(sum(matrix[i][j] for j in each), len(each))
            for k, each in enumerate(members)
            for i in range(count)
            if i not in taken and (len(each) < size or (len(each) == size and grown < larger))
        }
        nearest = min(pairs.values())
        ties = sorted(i * number + k for (i, k), value in pairs.items() if value == nearest)
        label, group = divmod(int(generator.choice(ties)), number)
        members[group].append(label)
    members = sorted(map(sorted, members))
    return tuple(next(k for k, each in enumerate(members) if i in each) for i in range(count))


@st.composite
def _matrices(draw, largest):
    """Counts with many ties or few, and a number of groups."""
    classes = draw(st.integers(4, 12))
    rows = st.lists(st.integers(0, largest), min_size=classes, max_size=classes)
    counts = np.array(draw(st.lists(rows, min_size=classes, max_size=classes)))
    return counts + np.eye(classes, dtype=int), draw(st.integers(2, classes // 2))


@given(_matrices(3) | _matrices(1000), st.integers(0, 5), st.sampled_from(["join", "split"]))
@settings(deadline=None, max_examples=60)
def test_groups_are_those_of_exact_arithmetic(case, seed, criterion):
    counts, number = case
    rates = [[Fraction(int(n), int(row.sum())) for n in row] for row in counts]
    sign = -1 if criterion == "join" else 1
    # A constant changes nothing; the diagonal neither.
    exact = [[sign * (a[j] + rates[j][i]) for j in range(len(a))] for i, a in enumerate(rates)]
    size, larger = divmod(len(counts), number)
    expected = _exactly(exact, number, size, larger, seed)
    assert balanced(distances(counts, criterion), number, seed) == expected
    if criterion == "join":
        full = -(-11 * len(counts) // (10 * number))
        assert released(counts, number, seed) == _exactly(exact, number, full, 0, seed)


@given(_matrices(3), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_groups_are_a_partition_within_their_sizes(case, seed):
    counts, number = case
    classes = len(counts)
    for criterion in ("join", "split"):
        found = balanced(distances(counts, criterion), number, seed)
        sizes = np.bincount(found, minlength=number)
        assert len(found) == classes
        assert len(sizes) == number
        assert max(sizes) - min(sizes) <= 1
        # By their first label.
        firsts = [found.index(group) for group in range(number)]
        assert firsts == sorted(firsts)
    sizes = np.bincount(released(counts, number, seed), minlength=number)
    assert sizes.sum() == classes
    assert min(sizes) >= 1
    # Full at 1.1 C / k or more: before its last label a group held fewer.
    assert max(sizes) - 1 < 1.1 * classes / number + 1e-9
    assert balanced(distances(counts), number, seed) == balanced(distances(counts), number, seed)


@given(st.integers(4, 12), st.data(), st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_the_order_of_labels_does_not_matter(classes, data, seed):
    number = data.draw(st.integers(2, classes // 2))
    generator = np.random.default_rng(seed)
    # Real numbers: no ties.
    counts = generator.uniform(0, 1, (classes, classes))
    order = generator.permutation(classes)
    for one, other in (
        (balanced(distances(counts), number, 0), balanced(_moved(counts, order), number, 1)),
        (released(counts, number, 0), released(counts[np.ix_(order, order)], number, 1)),
    ):
        there = [one[i] for i in order]
        # The same partition, numbered by the first label in the new order.
        renumbered = {group: k for k, group in enumerate(dict.fromkeys(there))}
        assert tuple(renumbered[group] for group in there) == other


def _moved(counts, order):
    return distances(counts[np.ix_(order, order)])


def test_ties_are_drawn_and_as_likely():
    nothing = np.eye(4) * 7
    # All is tied: every partition of 4 labels in pairs, and each of the three as likely.
    found = Counter(balanced(distances(nothing), 2, seed) for seed in range(300))
    assert sorted(found) == [(0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0)]
    assert min(found.values()) > 70
    assert len({balanced(distances(nothing), 2, 5) for _ in range(5)}) == 1
    assert len({released(np.eye(10), 3, seed) for seed in range(5)}) > 1


def test_rounding_breaks_no_ties():
    # 0.1 + 0.2 + 0.3 is more than 0.3 + 0.2 + 0.1: each row holds the same values in another order.
    around = np.abs(np.subtract.outer(np.arange(9), np.arange(9)))
    table = np.minimum(around, 9 - around)
    values = np.array([0.0, 0.1, 0.2, 0.3, 0.7])
    assert len(set(values[table].sum(1))) > 1
    whole = np.array([0, 1, 2, 3, 7])
    for seed in range(40):
        assert balanced(values[table], 4, seed) == balanced(whole[table], 4, seed)


def test_groups_of_a_thousand_labels():
    counts = np.random.default_rng(0).poisson(0.3, (1000, 1000)) + 40 * np.eye(1000, dtype=int)
    for number, sizes in ((500, {2}), (300, {3, 4}), (2, {500})):
        assert set(np.bincount(balanced(distances(counts), number, 0))) == sizes


def test_labels_in_blocks_are_found_and_split():
    # Five families of four labels that are confused with each other alone.
    family = np.arange(20) % 5
    counts = 80 * np.eye(20) + 5 * np.equal.outer(family, family)
    joined = balanced(distances(counts), 5, 0)
    # Starts are tied; of a family with two starts one group is another's. Its labels come first.
    assert mean_confusion(counts, family) == (pytest.approx(0.05), 0)
    within, across = mean_confusion(counts, joined)
    assert within > across
    split = balanced(distances(counts, "split"), 5, 0)
    assert mean_confusion(counts, split)[0] < within


def test_mean_confusion_by_hand():
    # {a, b}, {c, d}, {e, f}: (10 + 9 + 7) / 3 of 40; all 15 pairs have 51.
    within, across = mean_confusion(HAND, (0, 0, 1, 1, 2, 2))
    assert within == pytest.approx(26 / 3 / 40)
    assert across == pytest.approx((51 - 26) / 12 / 40)
    assert np.isnan(mean_confusion(HAND, range(6))[0])


# ---- What is refused.


def _with(value, row=1, column=2):
    changed = HAND.astype(float)
    changed[row, column] = value
    return changed


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (HAND[:5], r"has the shape \(5, 6\); it should be square, with a row for each true label"),
        (HAND[0], r"has the shape \(6,\)"),
        (np.zeros((0, 0)), r"has the shape \(0, 0\)"),
        (_with(np.nan), "holds 1 values that are no counts: the first is nan, in the row of '1' a"),
        (_with(np.inf), "the first is inf, in the row of '1' and the column of '2'; they should b"),
        (_with(-3), "the first is -3.0, in the row of '1' and the column of '2'"),
        (HAND * (np.arange(6) > 1)[:, None], "has empty rows: '0', '1'; each label should"),
    ],
)
def test_what_is_no_confusion_matrix_is_refused(matrix, message):
    for use in (confusion.check_confusion, distances, lambda each: released(each, 2, 0)):
        with pytest.raises(ValueError, match=message):
            use(matrix)


def test_labels_are_named_in_messages():
    names = list("abcdef")
    with pytest.raises(ValueError, match="in the row of 'b' and the column of 'c'"):
        confusion.check_confusion(_with(-1), names)
    with pytest.raises(ValueError, match="empty rows: 'c';"):
        confusion.check_confusion(HAND * (np.arange(6) != 2)[:, None], names)
    with pytest.raises(ValueError, match="5 names of classes for the 6 labels"):
        groups.make(HAND, names[:5], [2])


@pytest.mark.parametrize("number", [-1, 0, 1, 4])
def test_numbers_of_groups_out_of_range_are_refused(number):
    message = rf"6 labels can't be put into {number} groups; it should be 2..3: .*2 <= k <= C / 2"
    for use in (lambda: balanced(CONFUSED, number, 0), lambda: released(HAND, number, 0)):
        with pytest.raises(ValueError, match=message):
            use()


def test_other_values_out_of_range_are_refused():
    with pytest.raises(ValueError, match="3 labels can't be grouped; it takes 4"):
        balanced(np.ones((3, 3)), 2, 0)
    with pytest.raises(ValueError, match=r"no criterion 'joined'.*Did you mean 'join'"):
        distances(HAND, "joined")
    with pytest.raises(ValueError, match="seed is -1; it should be at least 0"):
        balanced(CONFUSED, 2, -1)
    with pytest.raises(ValueError, match=r"shape \(6, 4\); it should be square"):
        balanced(CONFUSED[:, :4], 2, 0)
    with pytest.raises(ValueError, match="Distances hold NaN or infinity"):
        balanced(_with(np.nan), 2, 0)
    # What is on the diagonal is not read.
    diagonal = CONFUSED + np.diag([np.nan, np.inf, -3, 2, 1, 0])
    assert balanced(diagonal, 3, 0) == balanced(CONFUSED, 3, 0)
    with pytest.raises(ValueError, match=r"no method 'release' .*Did you mean 'released'"):
        groups.make(np.ones((4, 4)), tuple("abcd"), (2,), method="release")


# ---- Coarse labels.


def test_coarse_labels_are_groups():
    labels, above = np.array([0, 1, 2, 0, 3, 1]), np.array([7, 4, 7, 7, 5, 4])
    assert coarse(labels, above) == (2, 0, 2, 1)
    with pytest.raises(ValueError, match="no coarse label, of 'pine', 'rose'"):
        coarse(labels, above, ["apple", "oak", "pear", "fig", "pine", "rose"])
    above[3] = 5
    with pytest.raises(ValueError, match=r"label 'apple' has the coarse labels \[5, 7\]; each l"):
        coarse(labels, above, ["apple", "oak", "pear", "fig"])
    with pytest.raises(ValueError, match=r"label '0' has the coarse"):
        coarse(labels, above)


# ---- The program.

LETTERS = tuple("abcdef")


@pytest.fixture
def matrix(tmp_path):
    np.save(tmp_path / "counts.npy", HAND)
    return tmp_path / "counts.npy"


def test_groups_are_made_of_a_matrix(matrix, tmp_path, capsys):
    out = tmp_path / "made.json"
    (tmp_path / "names.txt").write_text("\n".join(LETTERS) + "\n")
    named = f"--classes={tmp_path / 'names.txt'}"
    grouping.main([f"--matrix={matrix}", named, "--groups=3,2", f"--out={out}"])
    printed = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed[:4]]
    assert rows[0] == ["groups", "smallest", "largest", "confusion within", "confusion across"]
    # {a, b}, {c, f}, {d, e}: (10 + 2 + 5) / 3 of 40, and (51 - 17) / 12 of 40.
    assert rows[2] == ["3", "2", "2", "0.1417", "0.0708"]
    assert printed[4] == f"{out}: the groups, which may be edited"
    found = groups.load(out, LETTERS)
    assert {k: each.assignment for k, each in found.items()} == {
        2: (0, 0, 0, 1, 1, 1),
        3: (0, 0, 1, 2, 2, 1),
    }
    made = json.loads(out.read_text())["made"]
    assert made == f"the confusion matrix {matrix.name}, criterion join, method paper, seed 0"
    with pytest.raises(SystemExit):
        grouping.main([f"--matrix={matrix}", "--groups=2", f"--out={out}"])
    assert "made.json exists; choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--criterion=split"], (0, 1, 0, 2, 2, 1)),
        (["--method=released"], (0, 0, 1, 1, 1, 2)),
    ],
)
def test_the_criterion_and_the_method_are_chosen(tmp_path, arguments, expected):
    out = tmp_path / "made.json"
    (tmp_path / "counts.csv").write_text("\n".join(",".join(map(str, row)) for row in HAND) + "\n")
    given = [f"--matrix={tmp_path / 'counts.csv'}", "--groups=3", f"--out={out}"]
    grouping.main([*given, *arguments])
    assert groups.load(out) == {3: groups.Groups(tuple("012345"), expected)}


def _error(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        grouping.main(arguments)
    assert stopped.value.code == command.EXPLAINED
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --workdir --matrix --coarse is required"),
        (["--matrix=a.npy", "--workdir=b"], "not allowed with argument"),
        (["--matrix=a.npy"], "--groups is missing; give numbers of groups, such as --groups=20,33"),
        (["--matrix=a.npy", "--groups=a,b"], "'a,b' is no list such as 20,33,50"),
        (["--matrix=a.npy", "--groups=2"], "There is no file a.npy with a confusion matrix"),
        (["--matrix=a.txt", "--groups=2"], "--matrix is a.txt; it should be a file .npy or .csv"),
        (["--matrix=a.npy", "--groups=2", "--seed=-1"], "--seed is -1; it should be at least 0"),
        (["--matrix=a.npy", "--groups=2", "--data=digits"], "--data goes only with --coarse"),
        (["--workdir=a", "--groups=2", "--classes=b"], "--classes goes only with --matrix"),
        (["--matrix=a.npy", "--groups=2", "--group=3"], "Unknown without --workdir: --group=3"),
        (["--matrix=a.npy", "--groups=2", "--out=/nowhere/a.json"], "no directory to write /nowh"),
        (
            ["--matrix=a.npy", "--groups=2", "--method=released", "--criterion=split"],
            "--method=released only joins what is confused",
        ),
        (["--coarse=a"], "--data is missing; name the data set with coarse labels"),
        (["--coarse=a", "--data=digits", "--groups=2"], "--groups goes without --coarse"),
        (["--coarse=a", "--data=digits"], "digits has no coarse labels 'a'. Known: none"),
        (["--coarse=label", "--data=digits"], "digits has no coarse labels 'label'"),
        (
            ["--matrix=a.npy", "--groups=2", "--save_matrix=b.csv"],
            "--save_matrix goes only with --workdir",
        ),
        (
            ["--workdir=a", "--groups=2", "--save_matrix=b.npy"],
            "--save_matrix is b.npy; it should be a file .csv",
        ),
        (
            ["--workdir=a", "--groups=2", "--save_matrix=b.csv", "--out=./b.csv"],
            "--save_matrix and --out are both b.csv; name two files",
        ),
        (
            ["--workdir=a", "--groups=2", "--save_matrix=/nowhere/b.csv"],
            "no directory to write /nowhere/b.csv to",
        ),
        (["--workdir=a", "--groups=2"], "a holds no run: there is no config.json"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, _error(arguments, capsys))
    assert not (tmp_path / "groups.json").exists()


def test_counts_are_read_as_they_were_written(tmp_path):
    names, counts = ["red, green", 'a "b"', "3"], np.arange(9.0).reshape(3, 3)
    confusion.write(tmp_path / "a.csv", counts, names)
    read, named = confusion.read(tmp_path / "a.csv")
    np.testing.assert_array_equal(read, counts)
    assert named == names
    (tmp_path / "b.csv").write_text("0,1,2\n3,4,5\n6,7,8\n")
    read, named = confusion.read(tmp_path / "b.csv")
    np.testing.assert_array_equal(read, counts)
    assert named is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2", "a.csv holds no matrix of numbers: could not convert string to float: 'a'"),
        ("a,b\n1,2\n3,x", "no matrix of numbers: could not convert string to float: 'x'"),
        ("1,2\n3", "a.csv holds no matrix of numbers: its rows have 1 to 2 numbers"),
        ("", r"has the shape \(0,\); it should be square"),
        ("1,2,3\n4,5,6", r"has the shape \(2, 3\)"),
        ("1,0\n0,nan", "the first is nan"),
        ("1,2\n3,4", "2 labels can't be grouped"),
    ],
)
def test_a_table_that_holds_no_counts_is_refused(tmp_path, capsys, text, message):
    (tmp_path / "a.csv").write_text(text)
    given = [f"--matrix={tmp_path / 'a.csv'}", "--groups=2", f"--out={tmp_path / 'b.json'}"]
    assert re.search(message, _error(given, capsys))


def test_files_that_hold_no_counts_or_names_are_refused(tmp_path, matrix, capsys):
    np.save(tmp_path / "a.npy", np.array([{}, None]), allow_pickle=True)
    np.save(tmp_path / "b.npy", np.array([["1", "2"], ["3", "4"]]))
    (tmp_path / "c.npy").write_bytes(b"no array")
    given = ["--groups=2", f"--out={tmp_path / 'b.json'}"]
    for name, message in (
        ("a", "holds no matrix of numbers: Object arrays"),
        ("b", "holds no matrix of numbers: its values are <U1"),
        ("c", "holds no matrix of numbers: "),
    ):
        assert message in _error([f"--matrix={tmp_path / name}.npy", *given], capsys)
    names = tmp_path / "names.txt"
    given = [f"--matrix={matrix}", f"--classes={names}", *given]
    assert f"There is no file {names} with the names of the classes" in _error(given, capsys)
    names.write_text("a\nb\n")
    assert "There are 2 names of classes for the 6 labels" in _error(given, capsys)
    names.write_text("a\nb\nc\nd\ne\na\n")
    assert "names of labels are not distinct: 'a'" in _error(given, capsys)


def test_groups_are_made_of_coarse_labels(tmp_path, monkeypatch, capsys):
    def load(*asked):
        assert asked == ("tfds:tiny", "sets", configuration.default().data.cache)
        image = np.zeros((3, 2, 2, 1), np.uint8)
        # Both the training and the test images are asked.
        train = sources.Source(image, {"label": np.array([0, 1, 3]), "kind": np.array([1, 0, 1])})
        test = sources.Source(image, {"label": np.array([2, 1, 3]), "kind": np.array([0, 0, 1])})
        names = {"label": ("apple", "oak", "pine", "pear")}
        return sources.Dataset(train, test, {"label": 4, "kind": 2}, names)

    monkeypatch.setattr(sources, "load", load)
    out = tmp_path / "made.json"
    given = ["--data=tfds:tiny", "--dir=sets", f"--out={out}"]
    grouping.main(["--coarse=kind", *given])
    assert "| 2      | 2        | 2       |" in capsys.readouterr().out
    assert groups.load(out)[2].labels() == (("oak", "pine"), ("apple", "pear"))
    assert json.loads(out.read_text())["made"] == "kind of tfds:tiny"
    out.unlink()
    assert "no coarse labels 'kin'. Did you mean 'kind'?" in _error(
        ["--coarse=kin", *given], capsys
    )


# ---- A run.


def _config(**given):
    made = exiting.config(epochs=3, seeds=2, evaluate_batch_size=50, **given)
    made.backbone = configuration.backbone("small_cnn", classes=10, channels=(4, 8, 8))
    for section in (made.heads, made.objectives):
        del section.exit_3, section.exit_5
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    with jax.numpy_dtype_promotion("standard"):
        train.train(_config(), str(directory))
    return directory


@pytest.mark.optax_dtypes
def test_confusions_of_a_run_are_those_of_each_seed(trained, tmp_path, monkeypatch, capsys):
    runs = open_run(trained)
    kept = kept_weights(runs, trained)
    expected = np.zeros((10, 10))
    for seed in range(2):
        variables = jax.tree.map(lambda x, i=seed: x[i], kept.variables)
        examples = runs.feed.examples["validation"][seed]
        batch = runs.parts.lookup(runs.feed.arrays, examples)
        logits = runs.parts.network.apply(variables, batch["image"])["main"]
        np.add.at(expected, (np.asarray(batch["label"]), np.asarray(logits.argmax(-1))), 1)
    # 120 images a seed, 12 of each class: not a number of full batches.
    assert (expected.sum(1) == 24).all()
    # It has learned something, not all.
    assert 60 < expected.trace() < 235
    counts, of_run = [], run_confusion.of_run
    monkeypatch.setattr(run_confusion, "of_run", lambda *a: counts.append(of_run(*a)) or counts[0])
    out, kept_counts = tmp_path / "made.json", tmp_path / "counts.csv"
    given = [f"--out={out}", "--seed=3"]
    grouping.main([f"--workdir={trained}", "--groups=2,5", f"--save_matrix={kept_counts}", *given])
    np.testing.assert_array_equal(counts[0], expected)
    assert str(out) in capsys.readouterr().out
    names = tuple(map(str, range(10)))
    made = {k: groups.Groups(names, balanced(distances(expected), k, 3)) for k in (2, 5)}
    assert groups.load(out) == made
    assert "validation images of exits, criterion join" in out.read_text()
    out.unlink()
    grouping.main([f"--matrix={kept_counts}", "--groups=2,5", *given])
    assert groups.load(out) == made


@pytest.mark.optax_dtypes
def test_test_images_may_be_chosen_deliberately(trained, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(grouping, "make", lambda counts, *_: made.append(counts) or {})
    monkeypatch.setattr(groups, "save", lambda *_: None)
    grouping.main([f"--workdir={trained}", "--groups=2", f"--out={tmp_path}/a", "--split=test"])
    (counts,) = made
    labels = sources.load("digits", "").test.labels["label"]
    np.testing.assert_array_equal(counts.sum(1), 2 * np.bincount(labels))
    measured = json.loads((trained / "results.json").read_text())["splits"]["test"]["main/top_1"]
    assert counts.trace() / counts.sum() == pytest.approx(np.mean(measured), abs=0.002)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--groups=2,6"], "10 labels can't be put into 6 groups; it should be 2..5"),
        (["--groups=2", "--config.epochs=5"], "An override would change the run: epochs"),
    ],
)
def test_a_run_that_can_not_be_grouped_is_refused(trained, tmp_path, capsys, arguments, message):
    given = [f"--workdir={trained}", f"--out={tmp_path / 'made.json'}"]
    assert message in _error([*given, *arguments], capsys)


def test_runs_without_enough_images_or_labels_are_refused(tmp_path, monkeypatch, capsys):
    def written(name, made):
        Workdir(str(tmp_path / name), made).write_config()
        return [f"--workdir={tmp_path / name}", "--groups=2", f"--out={tmp_path / 'made.json'}"]

    bare = _config(evaluate_splits=("test",))
    bare.data.task.validation_per_class = 0
    message = "train with --config.data.task.validation_per_class=50, or choose others deliberat"
    assert message in _error(written("bare", bare), capsys)
    quickstart = configuration.load(f"{configuration.repository_configs()}/quickstart.py")
    assert "2 labels can't be grouped" in _error(written("pairs", quickstart), capsys)
    with pytest.raises(ValueError, match="The run has 9 validation images for 10 classes"):
        run_confusion._check_examples("validation", 9, 10)
    # Names of digits stand in errors on counts, too.
    counts = np.ones((10, 10)) * (np.arange(10) != 4)[:, None]
    monkeypatch.setattr(run_confusion, "of_run", lambda *_: counts)
    assert "has empty rows: '4'" in _error(written("empty", _config()), capsys)


def test_drawn_classes_keep_their_names(tmp_path):
    made = _config()
    made.data.update(draw_classes=4, images=0)
    made.data.classes.label = 4
    made.backbone.classes = 4
    Workdir(str(tmp_path), made).write_config()
    assert run_confusion.names_of(open_run(tmp_path)) == ("2", "4", "5", "7")


def test_names_are_those_of_what_the_run_classifies(tmp_path):
    quickstart = configuration.load(f"{configuration.repository_configs()}/quickstart.py")
    Workdir(str(tmp_path), quickstart).write_config()
    assert run_confusion.names_of(open_run(tmp_path)) == ("0", "1")
