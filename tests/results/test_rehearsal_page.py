"""The page of rehearsals shows what was recorded of every row."""

import pages


def test_the_page_of_rehearsals_shows_what_was_recorded(benchmark):
    rehearsals = benchmark("rehearsals")
    recorded = pages.recorded("rehearsal.json")
    assert rehearsals.page(recorded) == (pages.RESULTS / "rehearsal.md").read_text()
    # What was recorded of these is what they are now.
    for run in rehearsals.runs(["quickstart", "pairs_1"]):
        assert recorded["tables"][run.table]["rows"][run.row] == run.same
        assert recorded["rows"][run.same]["config"] == run.config


def test_rehearsals_of_all_kinds_are_shown(benchmark):
    machine = {"versions": "jax 9", "devices": "1 x cpu", "processor": "2 x fast", "platform": "x"}
    row = {
        **{"config": "", "machine": machine, "name": "", "parameters": 1234, "images": "real"},
        **{"whole": 7200, "memory": 2**29, "refused": "", "compiling": 9.0, "seconds": [1.0, 1.0]},
        **{"losses": {"total": [3.0, 2.0, 1.0]}, "diverged": None, "finished": True},
    }
    broken = {**row, "diverged": 2, "losses": {"total": [3.0, float("nan")]}, "seconds": [1.0]}
    refused = {**row, "refused": "too big for this machine: 2 GiB", "losses": {}, "seconds": []}
    rows = {"a/finite": row, "a/broken": broken, "a/refused": refused}
    names = {"finite": "a/finite", "broken": "a/broken", "refused": "a/refused", "new": "a/new"}
    shown = {
        "a": {"title": "The first", "rows": names},
        "b": {"title": "The second", "rows": {"again": "a/finite"}},
    }
    page = benchmark("rehearsals").page({"steps": 3, "tables": shown, "rows": rows})
    assert "Machine: 2 x fast, 1 x cpu; jax 9." in page
    summary, first, second = pages.tables_of(page)
    assert summary[2:] == [
        ["[a](#a)", "4", "2", "1", "1", "1", "at least 2.0"],
        ["[b](#b)", "1", "1", "1", "0", "0", "2.0"],
    ]
    assert first[2:] == [
        ["finite", "1,234", "real", "falls: 3 -> 1", "1", "0.50", "2.0"],
        ["broken", "1,234", "real", "diverges: a loss is not finite at step 2", "1", "0.50", ""],
        ["refused", "1,234", "real", "too big for this machine: 2 GiB", "", "0.50", ""],
        ["new", "", "", "not run", "", "", ""],
    ]
    assert second[2:] == [
        ["again (as a/finite)", "1,234", "real", "falls: 3 -> 1", "1", "0.50", "2.0"]
    ]
