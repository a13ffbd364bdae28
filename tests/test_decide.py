"""Claims of a table that are decided by adding seeds."""

import json
import math

import numpy as np
import pytest

from sire_jax import configuration, decide, paper_tables, reproduce

CONFIGS = configuration.repository_configs()
TABLES = sorted(path.stem for path in (CONFIGS / "tables").glob("*.json"))
TABLE = {
    "title": "Of nobody",
    "config": "quickstart.py",
    "options": [],
    "columns": {"accuracy": {"split": "test", "metric": "main/top_1"}},
    "curves": {"split": "test", "metric": "main/top_1"},
    "rows": [
        {"name": "bare", "variant": "main_only"},
        {"name": "aux", "variant": "auxiliary"},
        {"name": "other", "id": "other", "variant": "main_only"},
        {"name": "nobody's", "id": "nobody", "variant": "main_only"},
    ],
    "claims": [
        {"row": "auxiliary", "better_than": "main_only", "column": "accuracy", "by": 0.1},
        {"row": "other", "better_than": "main_only", "column": "accuracy", "by": 0.1},
    ],
}


@pytest.fixture
def trained(monkeypatch):
    """What is trained instead: figures by hand, and a list of (rows, overrides)."""
    calls = []

    def figures(table, rows, workdir, configs, option, overrides):
        calls.append(([paper_tables.identity(row) for row in rows], overrides))
        seed = len(calls)
        noise = np.random.default_rng(seed).normal(0, 0.01, 3)
        of_row = dict(zip(("main_only", "auxiliary", "other"), noise, strict=True))
        of_row["auxiliary"] += 0.1
        # By so much that it takes many seeds to tell.
        of_row["other"] += 0.05 + 0.1 * (-1) ** seed
        return [
            {"variant": n, "accuracy": {"runs": [of_row[n]]}, "diverged": [None], "seconds": 3.0}
            for n in calls[-1][0]
        ]

    monkeypatch.setattr(decide, "reproduce", figures)
    return calls


def test_seeds_are_added_until_all_is_decided_and_rows_dropped_that_no_claim_needs(
    trained, tmp_path, capsys
):
    judged = decide.decide(TABLE, tmp_path, CONFIGS, "", ["--config.epochs=2"], most=9)
    assert [found.verdict for found in judged] == ["confirmed", "undecided"]
    rows, overrides = trained[0]
    assert rows == ["main_only", "auxiliary", "other"]
    assert overrides == ["--config.epochs=2", "--config.seed=0", "--config.seeds=1"]
    # The first claim is decided by the fewest seeds that can tell.
    assert [len(rows) for rows, _ in trained] == [3] * judged[0].seeds + [2] * (9 - judged[0].seeds)
    assert trained[-1][0] == ["main_only", "other"]
    assert judged[1].seeds == len(trained) == 9
    assert judged[1].needed > 9
    assert "Seed 8: 1 of 2 claims decided." in capsys.readouterr().out
    details = json.loads((tmp_path / "claims.json").read_text())
    assert details["claims"][0]["verdict"] == "confirmed"
    assert len(details["figures"]["accuracy"]["main_only"]) == 9
    assert details["seconds"] == {
        "main_only": [3.0] * 9,
        "auxiliary": [3.0] * judged[0].seeds,
        "other": [3.0] * 9,
    }
    assert (tmp_path / "claims.png").stat().st_size > 5000
    page = (tmp_path / "claims.md").read_text()
    assert "| auxiliary better than main_only, accuracy | +0.1" in page
    assert "Overrides: --config.epochs=2" in page
    assert f"undecided (about {judged[1].needed} seeds may decide)" in page


def test_of_few_seeds_there_is_no_interval(trained, tmp_path):
    judged = decide.decide(TABLE, tmp_path, CONFIGS, most=2)
    assert {found.verdict for found in judged} == {"undecided"}
    assert json.loads((tmp_path / "claims.json").read_text())["claims"][0]["low"] is None
    assert "none of so few seeds" in decide.markdown(judged)


def test_a_run_that_diverges_decides_nothing_and_ends_its_claim(tmp_path, monkeypatch):
    def diverged(table, rows, *_):
        names = map(paper_tables.identity, rows)
        return [
            {"variant": n, "accuracy": {"runs": [0.1]}, "diverged": [7], "seconds": 1.0}
            for n in names
        ]

    monkeypatch.setattr(decide, "reproduce", diverged)
    judged = decide.decide(TABLE, tmp_path, CONFIGS, most=6)
    assert {found.verdict for found in judged} == {"diverged"}
    assert all(math.isnan(found.mean) and found.seeds == 1 for found in judged)
    stored = json.loads((tmp_path / "claims.json").read_text())
    assert stored["claims"][0]["mean"] is stored["claims"][0]["low"] is None
    assert stored["figures"]["accuracy"]["main_only"] == [None]


def test_what_can_not_be_decided_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"--decide is 0; it should be at least 1 seed"):
        decide.decide(TABLE, tmp_path, CONFIGS, most=0)
    with pytest.raises(ValueError, match=r"has no claims to decide"):
        decide.decide({**TABLE, "claims": []}, tmp_path, CONFIGS)
    with pytest.raises(ValueError, match=r"takes the seeds 0, 1, … by itself; leave out .*seed=7"):
        decide.decide(TABLE, tmp_path, CONFIGS, overrides=["--config.seed=7"])
    with pytest.raises(SystemExit):
        reproduce.main(["--table=pairs_1", "--decide=3", "--seeds=2"])
    assert "--decide chooses seeds and rows by itself" in capsys.readouterr().err


def test_a_row_without_the_figure_is_refused(tmp_path, monkeypatch):
    names = ("main_only", "auxiliary", "other")
    lines = [{"variant": n, "accuracy": {"runs": None}, "diverged": []} for n in names]
    monkeypatch.setattr(decide, "reproduce", lambda *_: lines)
    with pytest.raises(ValueError, match=r"The row 'auxiliary' has no figure 'accuracy'"):
        decide.decide(TABLE, tmp_path, CONFIGS)


def test_the_cost_of_a_row_that_can_not_be_rehearsed_is_not_known():
    assert decide.describe_cost({"aux": 0.5, "bare": None}, 20).endswith(
        "2.5 to 10 h. Without bare, of which it is not known."
    )


# Where a claim has its figure from elsewhere: those of the other and of the better, (table, row,
# column) each; by table, row, other row and column of the claim.
BARE, SSAL = ("ssal_3", "resnet50-0", "main"), ("ssal_3", "resnet50")
ELSEWHERE = {
    ("auxnet_exits_44", "multiway", "probes", "output_44"): (
        ("auxnet_2_cifar100", "resnet-44", "top_1_error"),
        ("auxnet_2_cifar100", "44-3", "top_1_error"),
    ),
    ("auxnet_exits_44", "joint", "probes", "output_44"): (
        ("auxnet_1", "resnet-44", "top_1_error"),
        ("auxnet_1", "44-3-joint", "top_1_error"),
    ),
    ("auxnet_exits_44", "multiway", "probes", "output_25"): (
        ("auxnet_6", "resnet-56-probes", "output_25"),
        ("auxnet_6", "56-5", "output_25"),
    ),
    **{
        ("auxnet_exits_44", "multiway", rule, "output_44"): (
            ("auxnet_1", f"44-3-{rule}", "top_1_error"),
            ("auxnet_1", "44-3-multiway", "top_1_error"),
        )
        for rule in ("joint", "pairwise")
    },
    **{
        ("ssal_1", row, "resnet18-0", column): (BARE, (*SSAL, column))
        for row in ("resnet18-2", "resnet18-2-later")
        for column in ("main", "linear")
    },
    ("ssal_1", "resnet18-2-later", "resnet18-2-later", "joint_eta_1"): (
        (*SSAL, "main"),
        (*SSAL, "joint"),
    ),
    ("ssal_1", "resnet18-2-later", "resnet18-0", "joint_eta_1"): (
        ("ssal_1", "resnet18-0", "main"),
        ("ssal_1", "resnet18-2", "joint_eta_1"),
    ),
}


def _claims():
    """Yields the shipped claims with their tables."""
    for name in TABLES:
        table = paper_tables.load_table(name, CONFIGS)
        if table.get("claims"):
            rows = [paper_tables.identity(row) for row in table["rows"]]
            yield from ((name, claim) for claim in decide.claims.read(table, rows))


def _printed(name, row, column):
    table = paper_tables.load_table(name, CONFIGS)
    (found,) = paper_tables.choose_rows(table, [row])
    return float(np.ravel(found[column])[0])


def test_claims_of_shipped_tables_have_the_figures_of_the_papers_tables():
    seen = set()
    for name, claim in _claims():
        key = (name, claim.row, claim.than, claim.column)
        if not claim.by:
            # What no paper prints a figure of says so.
            assert claim.source.startswith(("ours", "Fig."))
            continue
        better, other = ((name, *side) for side in claim.sides())
        if claim.source:
            other, better = ELSEWHERE[key]
            seen.add(key)
        sign = -1 if claim.lower else 1
        assert claim.by == pytest.approx(sign * (_printed(*better) - _printed(*other))), key
    assert seen == set(ELSEWHERE)


@pytest.mark.slow  # It trains networks of the quick start, seed by seed.
@pytest.mark.optax_dtypes
def test_the_program_says_what_it_costs_and_goes_on(tmp_path, capsys, monkeypatch):
    (tmp_path / "configs" / "tables").mkdir(parents=True)
    (tmp_path / "configs" / "quickstart.py").write_text((CONFIGS / "quickstart.py").read_text())
    table = {**TABLE, "rows": TABLE["rows"][:2], "claims": TABLE["claims"][:1]}
    (tmp_path / "configs" / "tables" / "own.json").write_text(json.dumps(table))
    monkeypatch.chdir(tmp_path)
    arguments = ["--table=own", "--config.epochs=1", "--config.data.task.train=100"]
    reproduce.main([*arguments, "--decide=2"])
    printed = capsys.readouterr().out
    assert "A seed of 2 rows takes about 0.00 h" in printed
    assert "2 to 2: " in printed
    runs = tmp_path / "runs" / "own"
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("results.json")}
    assert len(before) == 4
    reproduce.main([*arguments, "--decide=3"])
    after = {path: path.stat().st_mtime_ns for path in runs.rglob("results.json")}
    assert len(after) == 6
    assert before.items() <= after.items()
    figures = json.loads((runs / "claims.json").read_text())["figures"]["accuracy"]
    own = json.loads((runs / "seed_1" / "auxiliary" / "results.json").read_text())
    assert figures["auxiliary"][1] == own["splits"]["test"]["main/top_1"][0]
