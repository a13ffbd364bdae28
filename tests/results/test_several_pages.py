"""What several pages of results say is what the recorded figures beside them say."""

import re

import pages
import pytest

from sire_jax import configuration, paper_tables


@pytest.mark.parametrize(
    ("page", "heading", "recorded", "table"),
    [
        ("pairs.md", "As reported", "pairs_1.json", "pairs_1"),
        ("pairs.md", "As released", "pairs_1-as_released.json", "pairs_1"),
        ("pairs.md", "One choice at a time", "pairs_choices.json", "pairs_choices"),
        ("sire.md", "Table 2, reduced", "sire_2-reduced.json", "sire_2"),
        ("auxnet.md", "Every exit, by rule", "auxnet_exits-reduced.json", "auxnet_exits"),
        ("auxnet.md", "The rules compared", "auxnet_rules-reduced.json", "auxnet_rules"),
    ],
)
def test_a_table_is_what_reproduce_wrote(page, heading, recorded, table):
    lines = pages.recorded(recorded)["rows"]
    about = paper_tables.load_table(table, configuration.repository_configs())
    written = paper_tables.markdown(lines, about).splitlines()
    expected = [[cell.strip() for cell in line.strip("|").split("|")] for line in written]
    (found,) = pages.tables(page, heading)
    assert found[:1] + found[2:] == expected[:1] + expected[2:]


@pytest.mark.slow  # It traces networks of full size.
@pytest.mark.parametrize(
    ("table", "row"), [("sire_3", "ae_1"), ("sire_4", "googlenet_base"), ("ssal_1", "resnet18-2")]
)
def test_what_was_counted_is_what_the_code_makes(benchmark, monkeypatch, table, row):
    counting, recorded = benchmark("sizes"), pages.recorded("sizes.json")
    loaded = paper_tables.load_table(table, configuration.repository_configs())
    one = {**loaded, "rows": paper_tables.choose_rows(loaded, [row])}
    monkeypatch.setattr(paper_tables, "load_table", lambda *_: one)
    for name, counted in counting.count(table).items():
        assert counted == {row: recorded[name][row]}


def test_what_papers_print_is_what_the_tables_of_configs_have():
    def table(name):
        rows = paper_tables.load_table(name, configuration.repository_configs())["rows"]
        return {row["name"]: row for row in rows}

    papers = table("sire_1")
    for row in pages.tables("sire.md", "Table 1, reduced")[0][2:]:
        printed = papers[row[0]]
        assert [float(row[1]), float(row[3])] == [printed["top_1_error"], printed["top_5_error"]]
    minutes = {name: row["minutes"] for name, row in table("sire_4").items()}
    text = pages.prose("sire.md")
    assert "train for 124 and 212 minutes in Table 1, and for 119 and 202 in Table 4" in text
    assert (papers["Baseline"]["minutes"], papers["SIRe-CNN"]["minutes"]) == (124, 212)
    assert (minutes["CNN"], minutes["SIRe-CNN"]) == (119, 202)
    assert "80% and 90% for VGG16 and VGG19 in Table 4 (336 over 187 minutes, 370 over 195)" in text
    pairs = [(minutes[f"SIRe-{name}"], minutes[name]) for name in ("VGG16", "VGG19")]
    assert pairs == [(336, 187), (370, 195)]
    assert [round(100 * (a / b - 1)) for a, b in pairs] == [80, 90]
    branches = table("ssal_2")
    assert "GapCatNoSSAL has 40.2 and the bare network 39.9" in pages.prose("ssal.md")
    assert branches["GapCatNoSSAL"]["combined"][0] == 40.2
    assert branches["ResNet18"]["main"][0] == 39.9


def test_nothing_recorded_names_a_place_of_the_machine_that_it_was_measured_on():
    recorded = [path for path in pages.RESULTS.iterdir() if path.suffix in (".json", ".md")]
    assert len(recorded) > 30
    for path in recorded:
        # As a home directory is written, or a place under the root.
        assert not re.search(r'["\s](/(tmp|home|root|work)/)', path.read_text()), path.name
