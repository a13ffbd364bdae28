import collections
import inspect

import pytest
from ml_collections import ConfigDict

from sire_jax import registry


class Box:
    def __init__(
        self,
        size: int,
        name: str = "",
        ratio: float = 0.5,
        open: bool = False,
        sides: tuple = (1, 2),
        label: str = "a",
        rest=None,
        *parts,
        extra: int = 3,
        **others,
    ):
        self.given = (size, ratio, open, sides, label, rest, extra)


def bag(*, weight: float = 1.0):
    return ("bag", weight)


PARTS = {"box": Box, "bag": bag}


def _make(section, **supplied):
    return registry.create(PARTS, section, "container", **supplied)


def test_the_nearest_name_is_suggested_and_all_are_listed():
    names = ["stem", "block_2", "block_1"]
    message = " Did you mean 'block_1'? Known: block_1, block_2, stem."
    assert registry.nearest("blok_1", names) == message
    assert registry.nearest("xyz", names) == " Known: block_1, block_2, stem."
    assert registry.nearest("xyz", []) == " Known: none."


def test_parts_are_chosen_by_name():
    assert registry.choose(PARTS, "box", "container") is Box
    with pytest.raises(
        ValueError, match=r"no container 'bagg'\. Did you mean 'bag'\? Known: bag, b"
    ):
        registry.choose(PARTS, "bagg", "container")
    with pytest.raises(ValueError, match="no container '3'"):
        registry.choose(PARTS, 3, "container")


def test_parts_of_ones_own_are_imported():
    chosen = registry.choose_part(PARTS, "collections:OrderedDict", "container")
    assert chosen is collections.OrderedDict
    assert registry.create({}, {"name": "fractions:Fraction", "numerator": 3}, "number") == 3


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module:Part", "No module named 'no_such_module'"),
        ("collections:OrderdDict", "no attribute 'OrderdDict'"),
        ("collections.nothing:Part", "No module named 'collections.nothing'"),
        (":Part", ""),
        ("collections:", ""),
    ],
)
def test_a_part_that_cannot_be_imported_is_refused_with_the_reason(name, reason):
    with pytest.raises(ValueError, match=f"The container '{name}' can't be imported: .*{reason}"):
        registry.choose_part(PARTS, name, "container")


def test_what_is_no_part_is_never_imported():
    with pytest.raises(ValueError, match="There is no table 'os:getcwd'"):
        registry.choose({"pairs_1": 1}, "os:getcwd", "table")


def test_settings_are_the_arguments_that_a_config_may_give():
    known = registry.settings(Box)
    assert list(known) == ["size", "ratio", "open", "sides", "label", "rest", "extra"]
    assert known["ratio"].default == 0.5
    assert known["size"].default is inspect.Parameter.empty


def test_a_described_part_shows_all_settings():
    section = registry.describe(PARTS, "box", "container", ratio=0.25)
    assert section == {
        "name": "box",
        "ratio": 0.25,
        "open": False,
        "sides": (1, 2),
        "label": "a",
        "rest": None,
        "extra": 3,
    }
    message = "container 'box' has no setting 'ration'. Did you mean 'ratio'.*Known: extra, "
    with pytest.raises(ValueError, match=message):
        registry.describe(PARTS, "box", "container", ration=1)
    with pytest.raises(ValueError, match=r"no container 'boxx'. Did you mean 'box'"):
        registry.describe(PARTS, "boxx", "container")


def test_a_part_is_made_with_its_settings():
    assert _make({"name": "bag", "weight": 2.5}) == ("bag", 2.5)
    section = ConfigDict({"name": "box", "size": 4, "sides": [5, 6], "rest": {"a": [1]}})
    assert _make(section, extra=9).given == (4, 0.5, False, (5, 6), "a", {"a": [1]}, 9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 1, "ratoi": 2.0}, "'box' has no setting 'ratoi'. Did you mean 'ratio'"),
        ({"size": 1, "extra": 2}, "'box' has no setting 'extra'"),
        ({"ratio": 0.1}, "'box' needs a value for size"),
        ({"size": 1, "ratio": "high"}, "ratio is 'high', a str; it should be a float like 0.5"),
        ({"size": 1, "ratio": True}, "ratio is True, a bool; it should be a float like 0.5"),
        ({"size": 1, "open": 1}, "open is 1, a int; it should be a bool like False"),
        ({"size": 1, "sides": 3}, r"sides is 3, a int; it should be a tuple like \(1, 2\)"),
        ({"size": 1, "label": 3}, "label is 3, a int; it should be a str like 'a'"),
    ],
)
def test_wrong_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        _make({"name": "box", **given}, extra=1)


def test_a_section_without_a_name_is_refused():
    with pytest.raises(
        ValueError, match=r"A container needs a 'name'; it has only \['b', 'size'\]"
    ):
        _make({"size": 1, "b": 2})


@pytest.mark.parametrize(
    ("value", "default"),
    [(1, 0.5), (0.1, 0.5), (3, 1), (True, False), ("b", "a"), ((), (1,)), ("x", None)],
)
def test_a_value_of_the_type_of_the_default_passes(value, default):
    registry.check_type("setting", value, default)
    registry.check_type("setting", value, inspect.Parameter.empty)


@pytest.mark.parametrize(
    ("value", "default"),
    [(True, 1), (1.0, 1), (0, False), ("1", 1), (False, 0.5), (None, 1), ("ab", ("a",))],
)
def test_a_value_of_another_type_is_refused(value, default):
    with pytest.raises(ValueError, match=r"^setting is .*; it should be a .* like"):
        registry.check_type("setting", value, default)
