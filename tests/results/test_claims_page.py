"""The page of claims, which a reader of the papers opens first, says what was decided."""

import numpy as np
import pages
import pytest

from sire_jax import configuration, decide, paper_tables
from sire_jax.claims import read

# The record of each table of the page, its table, its option and what was overridden.
RECORDS = {
    "auxnet_exits_44-few_images-claims.json": ("auxnet_exits_44", "few_images", []),
    "ssal_1-few_images-claims.json": ("ssal_1", "few_images", []),
    "sire_1-few_images-claims.json": ("sire_1", "few_images", []),
    "pairs_1-claims.json": ("pairs_1", "", []),
    "pairs_1-as_released-claims.json": ("pairs_1", "as_released", []),
    "pairs_1-fashion-claims.json": ("pairs_1", "", ["--config.data.name=idx:fashion-mnist"]),
}


@pytest.mark.parametrize("name", RECORDS)
def test_the_page_shows_what_was_decided(name):
    assert decide.markdown(pages.decided(name)) in pages.whole("README.md")
    assert f"({name})" in pages.whole("README.md")


@pytest.mark.parametrize("name", RECORDS)
def test_what_was_decided_are_the_claims_of_the_table(name):
    table_name, option, overrides = RECORDS[name]
    stored = pages.recorded(name)
    configs = configuration.repository_configs()
    table = paper_tables.load_table(table_name, configs)
    rows = [paper_tables.identity(row) for row in table["rows"]]
    assert [decision.claim for decision in pages.decided(name)] == read(table, rows)
    assert (stored["option"], stored["title"]) == (option, table["title"])
    places = ("--config.data.dir", "--config.data.cache")
    assert [each for each in stored["overrides"] if not each.startswith(places)] == overrides


@pytest.mark.parametrize("name", [name for name in RECORDS if "few_images" in name])
def test_the_page_says_what_a_seed_takes(name):
    seconds = pages.recorded(name)["seconds"]
    medians = ", ".join(f"{row} {np.median(each):.0f}" for row, each in seconds.items())
    assert f"Seconds a seed, median: {medians}." in pages.prose("README.md")


# ---- The sections of the papers' pages.

SECTIONS = {
    "auxnet.md": ("auxnet_exits_44", ("output_44", "output_35", "output_25")),
    "ssal.md": ("ssal_1", ("main", "joint_eta_1", "linear")),
    "sire.md": ("sire_1", ("top_1_error", *(f"decoder_{i}_mse" for i in (1, 2, 3, 4)))),
}


@pytest.mark.parametrize("page", SECTIONS)
def test_means_of_few_images_are_those_of_the_seeds(page):
    name, columns = SECTIONS[page]
    stored = pages.recorded(f"{name}-few_images.json")
    claims = pages.recorded(f"{name}-few_images-claims.json")
    (table,) = pages.tables(page, "Few images")
    assert len(table) == 2 + len(stored["rows"])
    for cells, (row, figures) in zip(table[2:], stored["rows"].items(), strict=True):
        assert cells[0] == figures["name"]
        for cell, column in zip(cells[1:], columns, strict=True):
            values = figures.get(column)
            form = pages.scientific if column.endswith("mse") else "{:.2f}".format
            shown = values and f"{form(np.mean(values))} ± {form(np.std(values, ddof=1))}"
            assert cell == (shown or "")
            # The same seeds as those that the claims were decided by, or more.
            decided = claims["figures"].get(column, {}).get(row, [])
            assert decided == pytest.approx((values or [])[: len(decided)], abs=2e-6)


def test_what_is_said_of_gradients_is_what_was_measured():
    found = pages.recorded("sire_figure_3-few_images.json")["gradients"]["sire"]
    decoders = [f"decoder_{i}" for i in (1, 2, 3, 4)]
    first = sum(found[f"{name}/stage_1_block_1"] for name in decoders)
    assert first < found["main/stage_1_block_1"] / 100
    assert found["decoder_4/stage_4_block_2"] < found["main/stage_4_block_2"] / 1000
    errors = pages.recorded("sire_1-few_images.json")["rows"]
    of_i = [np.mean(errors["i"][f"decoder_{i}_mse"]) for i in (1, 4)]
    assert 5 < of_i[1] / of_i[0] < 6
    last = [np.mean(errors[row]["decoder_4_mse"]) for row in ("ire", "sire")]
    assert "falls from {:.3f} to {:.4f}".format(*last) in pages.prose("README.md")
    rows = pages.recorded("sire_2-few_images.json")["rows"]
    errors = [f"{rows[name]['top_1_error'][0]:.1f}" for name in rows]
    assert list(rows) == ["lambda_0.1", "lambda_0.2", "lambda_1.0", "lambda_5", "lambda_20"]
    assert f"errors are {', '.join(errors)}%, so that" in pages.prose("sire.md")
