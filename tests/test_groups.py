"""Partitions of labels and the file that holds them."""

import json
import re

import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sire_jax import groups
from sire_jax.groups import Groups, partition

CLASSES = ("apple", "oak", "pear", "pine", "rose")
TWO = Groups(CLASSES, (0, 1, 0, 1, 1))
THREE = Groups(CLASSES, (0, 1, 0, 1, 2))


def test_groups_are_listed_by_name():
    assert THREE.number == 3
    assert THREE.labels() == (("apple", "pear"), ("oak", "pine"), ("rose",))


@pytest.mark.parametrize(
    ("classes", "assignment", "message"),
    [
        (CLASSES, (0, 1, 0), "There are 5 labels, but 3 assignments to a group; each label"),
        (CLASSES, (0, 2, 0, 2, 2), r"in the groups \[0, 2\]; groups should be numbered 0, 1"),
        (CLASSES, (1, 2, 1, 2, 2), r"in the groups \[1, 2\]"),
        (CLASSES, (-1, 0, 0, 0, 0), r"in the groups \[-1, 0\]"),
        ((), (), r"in the groups \[\]"),
        (("a", "b", "a"), (0, 1, 0), "names of labels are not distinct: 'a' stand more than once"),
    ],
)
def test_what_is_no_partition_is_refused(classes, assignment, message):
    with pytest.raises(ValueError, match=message):
        Groups(classes, assignment)


def test_the_file_has_a_group_a_line(tmp_path):
    path = tmp_path / "groups.json"
    groups.save(path, {3: THREE, 2: TWO}, "by hand")
    assert (
        path.read_text()
        == """{
  "made": "by hand",
  "classes": ["apple", "oak", "pear", "pine", "rose"],
  "groups": {
    "2": [
      ["apple", "pear"],
      ["oak", "pine", "rose"]
    ],
    "3": [
      ["apple", "pear"],
      ["oak", "pine"],
      ["rose"]
    ]
  }
}
"""
    )
    assert groups.load(path) == {2: TWO, 3: THREE}


@given(
    st.lists(st.text(), min_size=1, max_size=8, unique=True).flatmap(
        lambda names: st.tuples(
            st.just(tuple(names)), st.lists(st.integers(0, 3), min_size=len(names)), st.text()
        )
    )
)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_written_is_read(tmp_path, case):
    classes, drawn, made = case
    drawn = drawn[: len(classes)]
    assignment = tuple(sorted(set(drawn)).index(group) for group in drawn)
    made_groups = Groups(classes, assignment)
    path = tmp_path / "groups.json"
    groups.save(path, {made_groups.number: made_groups}, made)
    assert groups.load(path, classes) == {made_groups.number: made_groups}
    assert json.loads(path.read_text("utf-8"))["made"] == made


def test_an_edited_file_keeps_the_order_of_its_groups(tmp_path):
    path = tmp_path / "groups.json"
    groups.save(path, {2: TWO}, "by hand")
    # A label moved, and the first group put last; sizes need not be alike.
    edited = path.read_text().replace('["apple", "pear"],\n', '["rose", "apple", "oak", "pine"],\n')
    path.write_text(edited.replace('["oak", "pine", "rose"]', '["pear"]'))
    assert groups.load(path) == {2: Groups(CLASSES, (0, 0, 1, 0, 0))}


def test_labels_take_the_order_of_the_data(tmp_path):
    path = tmp_path / "groups.json"
    groups.save(path, {3: THREE}, "by hand")
    order = ("rose", "pine", "pear", "oak", "apple")
    assert groups.load(path, order) == {3: Groups(order, (2, 1, 0, 1, 0))}


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (CLASSES[:-1], "not those of the data: 'rose' unknown. Known: apple, oak, pear, pine."),
        ((*CLASSES, "fern"), "not those of the data: 'fern' missing."),
        (
            ("aple", *CLASSES[1:]),
            "data: 'aple' missing. 'apple' unknown. Did you mean 'aple'? Known: aple, oak",
        ),
        (tuple(map(str, range(100))), "'0', '1', '2', '3', '4', '5', '6', '7', '8', '9' and 90 m"),
    ],
)
def test_other_classes_than_the_data_are_refused(tmp_path, classes, message):
    path = tmp_path / "groups.json"
    groups.save(path, {2: TWO}, "by hand")
    with pytest.raises(ValueError, match=re.escape(message)):
        groups.load(path, classes)


def _file(two, classes=CLASSES, key="2", **more):
    return json.dumps({"made": "", "classes": list(classes), "groups": {key: two}, **more})


FRUIT, TREES = ["apple", "pear"], ["oak", "pine", "rose"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_file([FRUIT, TREES[1:]]), "'2' of .* does not have each label once: 'oak' missing.$"),
        (_file([FRUIT, [*TREES, "aple"]]), "'aple' unknown. Did you mean 'apple'. Known: apple, o"),
        (_file([FRUIT, [*TREES, "pear"]]), "each label once: 'pear' more than once.$"),
        (_file([FRUIT, ["oak", "oak", "pine", "rose"]]), "'oak' more than once.$"),
        # All that is wrong at once.
        (
            _file([[*FRUIT, "pear"], [*TREES[1:], "elm"]]),
            "'oak' missing. 'pear' more than once. 'elm' unknown",
        ),
        (_file([FRUIT, [*TREES], []]), "'2' of .* has 3 groups; .* number, '3', or have as many"),
        (_file([FRUIT + TREES, []]), "has an empty group, the 2. of 2; give it a label or remove"),
        (_file([FRUIT, TREES], key="two"), "'two' of .* has 2 groups"),
        (_file([FRUIT, TREES], [*CLASSES, "oak"]), "classes of .* are not distinct: 'oak'"),
        ("no JSON", "groups.json can't be read as JSON: Expecting value"),
        (
            '{"classes": ["a"], "groups": {"1": [["a"]], "1": [["a"]]}}',
            "can't be read as JSON: the key '1' stands twice",
        ),
        *(
            (text, r'is no file of groups; it should look like \{"made": "how", "classes"')
            for text in (
                "[]",
                "{}",
                '{"classes": ["a"]}',
                '{"groups": {"1": [["a"]]}}',
                '{"classes": ["a"], "groups": [[["a"]]]}',
                _file("apple"),
                _file([["apple", 1], TREES]),
                _file(["apple", "oak"]),
                _file([FRUIT, TREES], groups={}),
                _file([FRUIT, TREES], classes=[1, 2]),
            )
        ),
    ],
)
def test_a_file_that_holds_no_groupings_is_refused(tmp_path, text, message):
    path = tmp_path / "groups.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        groups.load(path, CLASSES)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "groups.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"groups\.json can't be read as text: 'utf-8' codec"):
        groups.load(path)


def test_the_example_in_the_message_is_a_file_of_groups(tmp_path):
    path = tmp_path / "groups.json"
    path.write_text(partition.SHAPE)
    assert groups.load(path) == {2: Groups(("apple", "oak", "pear"), (0, 1, 0))}


def test_a_missing_file_says_how_to_make_one(tmp_path):
    command = "python -m sire_jax.grouping --workdir=DIR --groups=20 --out="
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(f"  {command}{path}")):
            groups.load(path)


@pytest.mark.parametrize(
    ("groupings", "message"),
    [
        ({}, "no groupings to write"),
        ({3: TWO}, "grouping 3 has 2 groups, not 3"),
        ({3: THREE, 2: Groups(CLASSES[::-1], TWO.assignment)}, "2 has other labels, or in another"),
    ],
)
def test_what_does_not_make_a_file_is_refused(tmp_path, groupings, message):
    with pytest.raises(ValueError, match=message):
        groups.save(tmp_path / "groups.json", groupings, "by hand")
    assert not list(tmp_path.iterdir())


def test_a_label_that_is_none_is_in_no_group():
    labels = jnp.asarray([[0, 4, 2], [-1, 5, 255]])
    assert THREE.of(labels).tolist() == [[0, 2, 0], [-1, -1, -1]]
    assert THREE.of(labels).dtype == jnp.int32
    assert int(THREE.of(-1)) == -1
    assert int(THREE.of(4)) == 2
    with pytest.raises(ValueError, match="Labels are float32; they should be integers"):
        THREE.of(jnp.ones(2))
