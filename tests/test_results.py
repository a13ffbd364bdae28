"""What pages of results say is what the recorded figures beside them say."""

import importlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sire_jax import configuration, groups, paper_tables, text
from sire_jax.configuration import experiment
from sire_jax.groups import clustering
from sire_jax.layers import convolution
from sire_jax.networks import MAIN
from sire_jax.updates.reached import Reached

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "docs" / "results"


def _tables(page, heading):
    """Returns the tables of a section of a page: rows of cells, the header first."""
    text = (RESULTS / page).read_text()
    return _tables_of(text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0])


def _all_tables(page):
    return _tables_of((RESULTS / page).read_text())


def _tables_of(text):
    found = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
        for table in found
    ]


def _prose(page):
    """Returns a page's text as one line."""
    return " ".join((RESULTS / page).read_text().split())


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
    lines = json.loads((RESULTS / recorded).read_text())["rows"]
    about = paper_tables.load_table(table, configuration.repository_configs())
    written = paper_tables.markdown(lines, about).splitlines()
    expected = [[cell.strip() for cell in line.strip("|").split("|")] for line in written]
    (found,) = _tables(page, heading)
    assert found[:1] + found[2:] == expected[:1] + expected[2:]


# ---- What benchmarks measured.


def _recorded(name):
    return json.loads((RESULTS / name).read_text())


def _spread(values):
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _ratios(found, name, other):
    return np.divide(found["seconds"][name], found["seconds"][other])


def _rule(found, name, digits):
    """The cells of a rule's row: how long, how much longer than joint, required, memory."""
    facts, joint = found["facts"][name], found["facts"]["joint"]
    size, least = (x["temporary_bytes"] + x["result_bytes"] for x in (facts, joint))
    is_joint = name == "joint"
    rule = "multiway" if " + " in name else name
    required = found["required"][rule]
    return [
        name,
        f"{1e3 * np.median(found['seconds'][name]):.0f}",
        "1" if is_joint else _spread(_ratios(found, name, "joint")),
        "1" if required == 1 else f"{required:.2f}",
        f"{size / 2**20:.0f}" + ("" if is_joint else f" ({size / least:.2f})"),
        f"{facts['compile_seconds']:.{digits}f}",
    ]


def _timed_rules(network):
    """What was measured of the rules on a network of benchmark_updates.json."""
    parts = _recorded("benchmark_updates.json").values()
    (found,) = (each["networks"][network] for each in parts if network in each["networks"])
    return found


@pytest.mark.parametrize(("place", "network"), [(0, "56-5"), (3, "56-10")])
def test_the_cost_of_rules_is_what_was_measured(place, network):
    table = _tables("auxnet.md", "Cost of a step")[place]
    found = _timed_rules(network)
    assert table[2:] == [_rule(found, row[0], 0) for row in table[2:]]
    assert {row[0] for row in table[2:]} == set(found["facts"])


def test_the_cost_of_rules_on_two_outputs_is_what_was_measured():
    table = _tables("auxnet.md", "Cost of a step")[2]
    found = _timed_rules("20-2")
    for name, ratio, required, memory in table[2:]:
        if "," not in name:
            assert [ratio, required, memory] == _rule(found, name, 0)[2:5]
            continue
        rule, _, aggregators = name.partition(" + ")
        names = [f"{rule} + {each}" for each in aggregators.split(", ")]
        middles = [f"{np.median(_ratios(found, each, 'joint')):.2f}" for each in names]
        assert ratio == ", ".join(middles)
        assert required == f"{found['required']['multiway']:.2f}"
        assert memory in {_rule(found, each, 0)[4] for each in names}
    other = [
        np.median(_ratios(found, f"PyTorch {each}", "PyTorch joint"))
        for each in ("separate", "mtl_backward")
    ]
    said = "`autograd.grad` per output {:.2f}, TorchJD `mtl_backward` {:.2f} times its joint; ours"
    ours = _spread(_ratios(found, "joint", "PyTorch joint"))
    assert f"{said.format(*other)} / PyTorch's {ours}, too noisy to tell" in _prose("auxnet.md")


def test_rules_beside_pytorch_are_what_was_measured():
    table = _tables("auxnet.md", "Cost of a step")[1]
    found = _timed_rules("56-5")
    names = ["PyTorch joint", "PyTorch separate", "PyTorch mtl_backward", "PyTorch backward"]
    for name, (_, milliseconds, own, ours, relative) in zip(names, table[2:], strict=True):
        assert milliseconds == f"{1e3 * np.median(found['seconds'][name]):.0f}"
        assert own == ("1" if name == names[0] else _spread(_ratios(found, name, names[0])))
        assert relative == _spread(_ratios(found, ours, name))


def test_what_is_said_of_the_cost_of_rules_is_what_was_measured():
    text = _prose("auxnet.md")
    found = _timed_rules("56-5")
    aggregated = [name for name in found["facts"] if " + " in name]
    quartiles = [np.quantile(_ratios(found, n, "multiway"), [0.5, 0.75]) for n in aggregated]
    middles, upper = np.transpose(quartiles)
    said = f"UPGrad and MGDA cost {middles.min():.2f} to {middles.max():.2f} times multi-way (upper"
    assert f"{said} quartile {upper.max():.2f})" in text
    sizes = {n: f["temporary_bytes"] + f["result_bytes"] for n, f in found["facts"].items()}
    of_joint = [sizes[name] / sizes["joint"] for name in ("pairwise", "multiway")]
    assert (
        "Pair-wise takes {:.1f} times the memory of joint and multi-way {:.2f}".format(*of_joint)
        in text
    )
    control = _spread(_ratios(found, "effective_joint", "joint"))
    assert f"but for a few scalars: {control} here" in text
    relative = np.median(_ratios(found, "joint", "PyTorch joint"))
    assert f"takes **{relative:.2f} of the time of PyTorch's**" in text


@pytest.mark.slow  # It traces a network of full size.
def test_effective_weights_are_those_of_the_rule():
    config = configuration.load(str(configuration.repository_configs() / "auxnet.py:56-5"))
    parts = experiment.build(config)
    weights = {name: each.weight for name, each in parts.objectives.items()}
    divisors = Reached.of(parts.reach, MAIN).divisors(weights)
    exits = [name for name in weights if name.startswith("exit_")]
    shares = [1 / float(divisors[name]) for name in exits]
    effective = [weights[name] * share for name, share in zip(exits, shares, strict=True)]
    own, text = [weights[name] for name in exits], _prose("auxnet.md")
    said = "{:.3f}, {:.3f}, {:.3f} and {:.0f} in place of {:.3f}, {:.3f}, {:.3f} and {:.0f}"
    assert said.format(*effective, *own).replace("0.", ".") in text
    # The main output's share is 1.
    decays = [sum(shares[i:]) + 1 for i in range(len(exits))]
    assert "{:.2f}, {:.2f}, {:.2f} and {:.0f} times as large in".format(*decays) in text


def test_what_is_said_of_exits_by_rule_is_what_was_measured():
    probes, *rules = _recorded("auxnet_exits-reduced.json")["rows"]
    last = {row["variant"]: row["output_56"]["ours"][0] for row in (probes, *rules)}
    assert max(last.values()) - min(last.values()) <= 1.5
    assert max(last, key=last.get) == "multiway"
    assert min(last, key=last.get) == "effective_joint"
    first = [row["output_15"]["ours"][0] - probes["output_15"]["ours"][0] for row in rules]
    assert min(first) > 1
    # What the picture draws ends where the table does.
    for name, curve in _recorded("auxnet_exits-curves.json")["curves"].items():
        assert curve["epoch"] == list(range(1, 21))
        assert round(last[name], 2) == curve["test"][-1]
        assert max(curve["test"][0], curve["train"][0]) > 98


def test_how_rules_differ_in_each_seed_is_what_was_recorded():
    rows = _recorded("auxnet_rules-reduced.json")["rows"]
    errors = {row["variant"]: np.asarray(row["top_1_error"]["runs"]) for row in rows}
    worse = [
        [f"{each:.2f}" for each in errors["20-2-multiway"] - errors[f"20-2-{other}"]]
        for other in ("joint", "effective_joint")
    ]
    text = _prose("auxnet.md")
    assert "*worse*, by {}, {} and {} points in the three seeds".format(*worse[0]) in text
    assert "worse than its control, too, by {}, {} and {}:".format(*worse[1]) in text


def test_the_cost_of_branches_is_what_was_measured():
    networks = _recorded("benchmark_ssal.json")["networks"]
    (table,) = _tables("ssal.md", "Cost of branches")
    variants = ["resnet50", "resnet50,0", "resnet18", "resnet18,0"]
    for variant, (_, required, *times, peak, plan, compiling) in zip(
        variants, table[2:], strict=True
    ):
        found, bare = networks[variant.partition(",")[0]], f"{variant.partition(',')[0]},0"
        facts, least = found["facts"][variant], found["multiply_adds"][bare]
        step, main = (f"{variant}: {kind}" for kind in ("step", "main alone"))
        is_bare = variant == bare
        count = found["multiply_adds"][variant] / least
        assert required == ("1" if is_bare else f"{count:.2f}")
        assert times == [
            f"{1e3 * np.median(found['seconds'][step]):.0f}",
            "1" if is_bare else _spread(_ratios(found, step, f"{bare}: step")),
            ""
            if is_bare
            else _spread(_ratios(found, f"{variant}: all outputs", f"{bare}: main alone")),
            "1" if is_bare else _spread(_ratios(found, main, f"{bare}: main alone")),
        ]
        assert [peak, plan] == [
            f"{x / 2**20:.0f}" for x in (facts["memory"], facts["plan"]["step"])
        ]
        assert compiling == f"{facts['compile_seconds']['step']:.0f}"


def test_what_is_said_of_branches_costs_is_what_was_counted():
    adds = _recorded("benchmark_ssal.json")["networks"]["resnet18"]["multiply_adds"]
    sizes = _recorded("sizes.json")["ssal_1"]
    of_size = 100 * (1 - sizes["resnet18-0"] / sizes["resnet18-2"])
    of_adds = 100 * (1 - adds["resnet18,0"] / adds["resnet18"])
    said = f"have {of_size:.0f}% of the parameters and {of_adds:.0f}% of the multiply-adds"
    assert f"ResNet18's two {said}" in _prose("ssal.md")


def _decoders(row):
    """The decoders' mean loss of each step."""
    return np.mean([each for k, each in row["losses"].items() if k.startswith("decoder")], axis=0)


def test_three_hundred_steps_are_what_was_recorded():
    recorded = _recorded("sire_4-rehearsal.json")["rows"]
    (table,) = _tables("sire.md", "Three hundred steps as shipped")
    assert [row[0].lower() for row in table[2:]] == list(recorded)
    for name, *cells in table[2:]:
        row = recorded[name.lower()]
        main, decoders = row["losses"]["main"], _decoders(row)
        assert (row["images"], row["diverged"], len(main)) == ("real", None, 300)
        means = [f"{np.mean(main[step - 10 : step]):.2f}" for step in (50, 100, 200, 300)]
        decoded = [f"{np.mean(decoders[step - 10 : step]):.4f}" for step in (50, 300)]
        memory = f"{row['memory'] / 2**30:.1f}"
        first = [f"{main[0]:.2f}", f"{max(main):.2f}"]
        assert cells == [*first, *means, f"{decoders[0]:.2f}", *decoded, memory]


def test_what_is_said_of_three_hundred_steps_is_what_was_recorded():
    recorded, said = _recorded("sire_4-rehearsal.json")["rows"], _prose("sire.md")
    seconds = {name: np.median(row["seconds"]) for name, row in recorded.items()}
    hours = {name: each * recorded[name]["whole"] / 3600 for name, each in seconds.items()}
    least, most = 1e3 * seconds["cnn"], 1e3 * seconds["resnet50"]
    assert seconds["cnn"] == min(seconds.values())
    assert seconds["resnet50"] == max(seconds.values())
    assert f"between {least:.0f} ms (SIRe-CNN) and {most:.0f} ms (ResNet50)" in said
    assert f"between {hours['cnn']:.1f} and {hours['resnet50']:.1f} hours" in said
    assert f"ResNet50 to {max(recorded['resnet50']['losses']['main']):.0f}." in said
    of_ten = {
        name: np.convolve(row["losses"]["main"], np.ones(10) / 10, "valid")
        for name, row in recorded.items()
    }
    for name, row in recorded.items():
        main, decoders = of_ten[name], _decoders(row)
        assert main[-1] < main[90] < np.log(100)
        assert name == "cnn" or (main[90:] < np.log(100)).all()
        assert decoders[-1] < decoders[0] / 200
    again = of_ten["cnn"][90:]
    assert f"once more, {again.max():.2f} around step {90 + again.argmax() + 10:.0f}" in said


def test_what_was_recorded_with_former_initial_values_says_so():
    assert "--option=linear,he" in _recorded("sire_1-reduced.json")["note"]


def test_figures_between_the_lines_of_pairs_are_of_its_tables():
    rows = {row["variant"]: row for row in _recorded("pairs_choices.json")["rows"]}
    text = (RESULTS / "pairs.md").read_text().partition("## One choice at a time")[0]
    said = text.partition("## What we read out of it")[2]
    conv = ("conv_whole", "conv_unscaled", "conv_both", "conv_bn", "conv_bn_affine")
    augment = ("conv_augment_whole", "conv_augment_unscaled", "conv_augment_both")
    auxiliary = ("aux_0.1_loss", "aux_0.1_unscaled", "aux_10", "shared_no_bn")
    for variant in (*conv, *augment, *auxiliary):
        assert "{:.3f} ± {:.3f}".format(*rows[variant]["test_acc"]["ours"]) in said, variant
    assert "{:.3f} ± {:.3f}".format(*rows["aux_10"]["order"]["ours"]) in said
    accuracies = {
        row["variant"]: [f"{each:.3f}" for each in row["test_acc"]["ours"]]
        for row in _recorded("pairs_1.json")["rows"]
    }
    for variant in ("residual", "resless"):
        assert " ± ".join(accuracies[variant]) in said
    apart = float(accuracies["aux_10"][0]) - float(accuracies["aux_0.1"][0])
    assert f"a = 0.1 comes within {apart:.3f} of a = 10" in " ".join(said.split())


def test_what_classification_does_is_what_was_recorded():
    recorded = _recorded("sire_classification.json")["rows"].values()
    names = {"base": "base CNN", "re": "Re-CNN"}
    changes = {
        "--config.optimizer.learning_rate.init_value=0.01": "learning rate 0.01",
        "--config.backbone.dropout=0.0": "no dropout",
        "--config.backbone.width=0.25": "a quarter of the width",
    }
    found = {
        (
            names[row["row"]],
            "He" if row["option"] else "PyTorch",
            "".join(changes[each] for each in row["overrides"]),
            str(row["steps"]),
            f"{row['main'][-1]:.3f}",
        )
        for row in recorded
    }
    (table,) = _tables("sire.md", "What classification does")
    assert {tuple(row) for row in table[2:]} == found


def test_how_long_classification_stays_at_guessing_is_what_was_recorded():
    rows = _recorded("sire_classification.json")["rows"]

    def steps_at_guessing(name):
        row = rows[name]
        return sum(loss > 4.59 for loss in row["main"]) * row["steps"] // len(row["main"])

    stays = f"initial values it stays there for {steps_at_guessing('re, longer')} steps"
    assert stays in _prose("sire.md")
    assert steps_at_guessing("re, PyTorch's initial values, longer") < 100
    assert "with PyTorch's for fewer than 100;" in _prose("sire.md")


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a program of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module


def test_the_maps_of_what_trains_are_what_was_recorded(benchmark):
    stability, said = benchmark("stability"), (RESULTS / "sire.md").read_text()
    for chosen in stability.MAPS:
        recorded = _recorded(f"{chosen.name}.json")
        assert (recorded["steps"], recorded["batch_size"]) == (chosen.steps, chosen.batch)
        assert set(recorded["rows"]) == {called for *_, called in chosen.cells()}
        for width in chosen.widths:
            assert text.align(stability.rows(chosen, recorded["rows"], width)) in said


def test_what_is_said_of_readings_is_what_was_recorded(benchmark):
    stability, rows = benchmark("stability"), _recorded("sire_readings.json")["rows"]
    finite = {
        reading: "".join(
            "-+"[rows[f"{reading}_{weight}"]["diverged"] is None] for weight in stability.LAMBDAS
        )
        for reading in stability.READINGS
    }
    # The paper's line: 0.1 and 0.2 train, 0.5 and 1.0 collapse.
    assert [name for name, line in finite.items() if line == "++--"] == ["linear_heavy_ball"]
    nesterov = {name: line for name, line in finite.items() if name != "linear_heavy_ball"}
    assert {line for line in nesterov.values() if line[1] == "+"} == {"++++"}
    shipped = [rows[f"normalized_pytorch_{weight}"]["losses"] for weight in stability.LAMBDAS]
    assert max(np.mean(each["main"][-5:]) for each in shipped) < stability.LEARNING
    errors = [np.mean(each[f"decoder_{i}"][-5:]) for each in shipped for i in (1, 4)]
    assert f"errors of {min(errors):.4f} to {max(errors):.4f}" in _prose("sire.md")


def test_a_cell_of_the_map_says_what_became_of_a_row(benchmark):
    cell = benchmark("stability").cell
    finite = {"refused": "", "diverged": None, "losses": {"main": [9.0, 4.0, 4.0, 4.0, 4.0, 4.5]}}
    assert cell(finite) == "4.10"
    assert cell({**finite, "diverged": 7}) == "NaN at 7"
    assert (
        cell({"refused": "too big for this machine", "diverged": None, "losses": {}}) == "too big"
    )
    assert cell(None) == ""


def test_the_page_of_rehearsals_shows_what_was_recorded(benchmark):
    rehearsals = benchmark("rehearsals")
    recorded = _recorded("rehearsal.json")
    assert rehearsals.page(recorded) == (RESULTS / "rehearsal.md").read_text()
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
    summary, first, second = _tables_of(page)
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


def test_a_row_that_diverges_was_recorded():
    fine, diverged = _recorded("sire_2-reduced.json")["rows"]
    assert (fine["variant"], fine["diverged"]) == ("lambda_0.2", [None])
    assert (diverged["variant"], diverged["diverged"]) == ("lambda_0.5", [8])
    assert fine["top_1_error"]["ours"][0] == pytest.approx(99, abs=1)
    assert diverged["top_1_error"]["ours"][0] == 100


def _mean(figure):
    return "" if figure["ours"] is None else "{:.2f} ± {:.2f}".format(*figure["ours"])


def test_branches_against_none_are_what_reproduce_wrote():
    rows = _recorded("ssal_1-reduced.json")["rows"]
    table = _tables("ssal.md", "Branches against none")[0]
    columns = ("main", "joint_eta_1", "linear")
    assert [row[1:4] for row in table[2:]] == [[_mean(row[c]) for c in columns] for row in rows]


def test_what_a_linear_combination_is_fitted_to_is_what_was_measured():
    (seed,), text = _recorded("joint_prediction-overfit.json")["seeds"], _prose("ssal.md")
    own = seed["main, training images"], seed["main"]
    assert "is right on {:.1f}% of these and on {:.1f}% of test images".format(*own) in text
    few = seed["linear, training images"], seed["linear, held-out images"]
    assert (
        "harms ({:.1f}%); to as many that were held out it harms more ({:.1f}%)".format(*few)
        in text
    )
    many = seed["linear"], seed["linear, main alone"]
    assert "it has {:.1f}%, of which the main output alone has {:.1f}%".format(*many) in text


def test_what_activation_maps_say_is_what_was_recorded():
    images, text = _recorded("ssal_maps.json")["images"], _prose("ssal.md")
    assert "None of these four images is classified rightly, but of two of them the first" in text
    assert [image["main"].split("\n")[1] == image["image"] for image in images] == [False] * 4
    known = [
        image["image"]
        for image in images
        if image["image"] in re.split(r"[,\s]+", image["branch_1"])
    ]
    assert known == ["willow_tree", "tiger"]
    shares = [image["branch_1"].split("%")[0] for image in images]
    assert f"is one of the trees for it ({shares[1]}%)" in text
    assert f"stripes or spots ({shares[3]}%)" in text


def test_what_a_joint_prediction_rests_on_is_what_was_measured():
    seeds, text = _recorded("joint_prediction.json")["seeds"], _prose("ssal.md")
    found = {name: np.asarray([each[name] for each in seeds]) for name in seeds[0]}
    table = _tables("ssal.md", "Branches against none")[1]
    names = ["main", *(f"eta {eta}" for eta in table[0][2:])]
    assert table[2][1:] == [f"{found[name].mean():.2f}" for name in names]
    harms = found["main"] - found["eta 1"]
    assert "at eta 1 by {:.1f}, {:.1f} and {:.1f} points".format(*harms) in text
    assert "eta is fitted to {:.2f}, {:.2f} and {:.2f}.".format(*found["eta, fitted"]) in text
    own, mains = (
        [found[name.format(f"branch_{i}")].mean() for i in (1, 2)]
        for name in ("{}, groups", "main, groups of {}")
    )
    said = "right on {:.1f}% of images about 20 groups and on {:.1f}% about 50"
    assert said.format(*own) in text
    assert "added up over each group, on {:.1f}% and {:.1f}%".format(*mains) in text
    bare, branched = _recorded("ssal_1-reduced.json")["rows"]
    gains = np.subtract(branched["main"]["runs"], bare["main"]["runs"])
    assert "by {:.1f}, {:.1f} and {:.1f} points in the three seeds, **and".format(*gains) in text
    linear, alone = found["linear"].mean(), found["linear, main alone"]
    assert f"combination gains {linear - bare['main']['ours'][0]:.1f} points" in text
    said = f"it has {alone.mean():.2f} ({{:.2f}}, {{:.2f}} and {{:.2f}} in the three seeds)"
    assert said.format(*alone) in text
    assert f"{linear - alone.mean():.1f} point is theirs" in text


def _scientific(value, digits=1):
    """As 1.5e-2."""
    return re.sub(r"e-0", "e-", f"{value:.{digits}e}")


def test_table_1_of_sire_reduced_is_what_reproduce_wrote():
    recorded = _recorded("sire_1-reduced.json")
    rows = recorded["rows"]
    (table,) = _tables("sire.md", "Table 1, reduced")
    for shown, row in zip(table[2:], rows, strict=True):
        assert shown[0] == row["name"]
        for cell, column in ((2, "top_1_error"), (4, "top_5_error")):
            assert shown[cell] == _mean(row[column])
        errors = recorded["decoder_mse"].get(row["variant"], {})
        means = [np.mean(errors.get(f"decoder_{i}/loss", np.nan)) for i in (1, 2, 3, 4)]
        assert shown[5:] == ["" if np.isnan(each) else _scientific(each) for each in means]
    errors = {row["variant"]: np.asarray(row["top_1_error"]["runs"]) for row in rows}
    apart = errors["sire"] - errors["base"]
    deviations = [each.std(ddof=1) for each in (errors["sire"], errors["base"])]
    error = np.hypot(*deviations) / np.sqrt(len(apart))
    said = f"SIRe-CNN is {apart.mean():.1f} points *above* the baseline, about two standard errors"
    assert said in _prose("sire.md")
    assert round(apart.mean() / error) == 2


def test_the_flow_of_gradients_is_what_was_measured():
    recorded, said = _recorded("sire_figure_3-reduced.json"), _prose("sire.md")
    errors, gradients = recorded["errors"].values(), recorded["gradients"]
    assert f"test errors of {min(errors):.1f} to {max(errors):.1f}%" in said
    means = {
        (row, objective): np.array([np.mean(each) for each in convolutions.values()])
        for row, objectives in gradients.items()
        for objective, convolutions in objectives.items()
    }
    decoders = [key for key in means if key[1].startswith("decoder")]
    less = [means[row, "main"][0] / means[row, each][0] for row, each in decoders]
    assert f"between {min(less):.0f} and {max(less):.0f} times less" in said
    for key in decoders:
        own = means[key][: 2 * int(key[1][-1])]
        # Largest at the first, least at its own stage, nothing behind it.
        assert (np.diff(own) < 0).all()
        assert not means[key][len(own) :].any()
    for row in gradients:
        assert (np.abs(np.log2(means[row, "main"] / means["base", "main"])) < 1).all()
    for row in ("ae_4", "sire"):
        ends = means[row, "decoder_4"][[0, -1]]
        assert 500 < ends[0] / ends[1] < 1000


def test_speed_beside_pytorch_is_what_was_measured():
    results = _recorded("benchmark_sire.json")["results"]
    table = _tables("sire.md", "Speed beside PyTorch")[0]
    eager = {}
    for each in results:
        if each["engine"] == "eager":
            eager[each["network"]] = [one["seconds"] for one in each["rounds"]]
    for (_, _, *cells), each in zip(table[2:], _as_shown(results), strict=True):
        seconds = [one["seconds"] for one in each["rounds"]]
        middle = np.median(seconds)
        ratio = np.median(np.divide(seconds, eager[each["network"]]))
        relative = "1" if each["engine"] == "eager" else f"{ratio:.2f}"
        assert cells == [
            f"{1e3 * middle:.1f}",
            f"{each['batch_size'] / middle:.0f}",
            "" if each["dtype"] == "bfloat16" else relative,
            f"{each['rounds'][-1]['memory'] / 2**20:.0f}",
        ]


def _as_shown(results):
    """Orders measurements as the page does."""
    engines = ["ours", "plain", "eager", "compiled"]
    return sorted(
        results,
        key=lambda x: (
            x["network"],
            engines.index(x["engine"]),
            x["dtype"] != "float32",
            x["remat"],
        ),
    )


def test_what_is_said_of_speed_beside_pytorch_is_what_was_measured(benchmark):
    recorded = _recorded("benchmark_sire.json")
    found = {(r["network"], r["engine"], r["dtype"], r["remat"]): r for r in recorded["results"]}

    def seconds(network, engine, dtype="float32"):
        rounds = found[network, engine, dtype, False]["rounds"]
        return np.asarray([each["seconds"] for each in rounds])

    def ratios(a, b):
        return [np.median(seconds(n, a) / seconds(n, b)) for n in ("base", "sire")]

    text = _prose("sire.md")
    layers = _recorded("benchmark_convolution.json")
    sums = [sum(sum(each[name]) for each in layers) for name in ("ours", "torch")]
    plans = [found["sire", "ours", "float32", r]["plan"] / 2**20 for r in (False, True)]
    narrow = found["sire", "ours", "bfloat16", False]["plan"] / 2**20
    gained = np.median(seconds("sire", "ours", "bfloat16") / seconds("sire", "ours"))
    engines = ("ours", "eager", "compiled")
    costs = [np.median(seconds("sire", e) / seconds("base", e)) for e in engines]
    adds = recorded["multiply_adds"]
    for said in (
        "a step takes {:.2f} of PyTorch eager's time for the base CNN and {:.2f} for SIRe-CNN,"
        " and {:.2f} and {:.2f} of the time that it takes without".format(
            *ratios("ours", "eager"), *ratios("ours", "plain")
        ),
        "take {:.0f} ms where PyTorch's take {:.0f}".format(*sums),
        f"XLA plans {plans[1]:.0f} MiB with them and {plans[0]:.0f} without",
        f"**bfloat16 takes {gained:.2f} of float32's time** on this processor,"
        f" which has instructions for it (AMX), and {narrow:.0f} MiB",
        "takes {:.1f} times the time of its base CNN here (PyTorch eager {:.1f}, compiled"
        " {:.1f})".format(*costs),
        f"{adds['sire'] / adds['base']:.2f} times as many multiply-adds",
    ):
        assert said in text
    profile, results = benchmark("profile_step"), _recorded("benchmark_profile.json")["results"]
    assert profile.report(results) in (RESULTS / "sire.md").read_text()
    shares = [
        sum(each[kind] for kind in profile.PASSES) / profile.total(each)
        for each in (results[key] for key in list(results)[:4])
    ]
    said = (
        "{:.0%} of the time of all operations of the base CNN's step, {:.0%} of SIRe-CNN's, {:.0%}"
    )
    said += " and {:.0%} of AuxNet-56-5's by joint and by multi-way backpropagation"
    assert said.format(*shares) in text


def test_operations_are_of_the_kind_that_they_are(benchmark):
    def run(x, kernel):
        y = convolution.convolve(x, kernel, 1)
        flat = y.reshape(len(x), -1)
        return jax.nn.relu(y), (flat @ flat.T), (y**2).sum((0, 1, 2))

    arguments = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
    program = jax.jit(run).lower(*arguments).compile().as_text()
    kinds = benchmark("profile_step").kinds(program)
    assert {"convolutions, forward", "matrix products"} <= set(kinds.values())


def test_what_a_step_costs_by_its_size_is_what_was_measured(benchmark):
    text = (RESULTS / "scaling.md").read_text()
    for curve, points in _recorded("benchmark_curves.json")["curves"].items():
        assert benchmark("curves").table(curve, points) in text


def test_convolutions_beside_pytorch_are_what_was_measured():
    recorded = _recorded("benchmark_convolution.json")
    text = (RESULTS / "sire.md").read_text()
    rows = re.findall(r"^  \| (\d+) px, (\d+) to (\d+) (.*)\|$", text, flags=re.MULTILINE)
    for (*layer, cells), each in zip(rows, recorded, strict=True):
        assert [int(n) for n in layer] == [each[k] for k in ("side", "channels", "features")]
        pairs = zip(each["ours"], each["torch"], strict=True)
        expected = [f"{x:.1f}" if x else "" for pair in pairs for x in pair]
        assert [cell.strip() for cell in cells.strip(" |").split("|")] == expected
    sums = np.sum([[each["ours"], each["torch"]] for each in recorded], 0).T.ravel()
    (total,) = re.findall(r"^  \| all, ms (.*)\|$", text, flags=re.MULTILINE)
    assert re.findall(r"[\d.]+", total) == [f"{each:.1f}" for each in sums]


def test_what_devices_and_processes_cost_is_what_was_measured():
    (table,) = _tables("scaling.md", "Devices and processes")
    found = {
        (each["scaling"], each["unit"], each["number"], each["parallel"]): each
        for each in _recorded("benchmark_scaling.json")["scaling"]
    }
    scaling = ""
    for title, by, *cells in table[2:]:
        scaling = {"": scaling, "32 for each": "weak"}.get(title, "strong")
        number, unit = by.split()
        unit = {"device": "devices", "process": "processes"}.get(unit, unit)
        for parallel, cell in zip(("jit", "pmap"), cells, strict=True):
            each = found.get((scaling, unit, int(number), parallel))
            if cell:
                efficiency = f" ({each['efficiency']:.2f})" * (each["number"] > 1)
                assert cell == f"{each['images_per_second']:,.0f}{efficiency}"
            else:
                assert each is None


def test_a_gpu_beside_a_cpu_is_what_was_measured():
    (table,) = _tables("scaling.md", "A GPU beside a CPU")
    apart = _recorded("accelerator.json")["apart"].values()
    assert [[float(cell) for cell in row[1:]] for row in table[2:]] == [
        [each[what] for what in ("losses", "moved", "outputs")] for each in apart
    ]


def test_restarts_take_what_was_measured():
    (table,) = _tables("scaling.md", "Restart")
    recorded = _recorded("benchmark_scaling.json")["restart"]
    expected = [[f"{each[k]:.1f} s" for k in ("compiled", "loaded")] for each in recorded]
    assert [row[1:] for row in table[2:]] == expected


def test_feeds_are_what_was_measured():
    streams = _recorded("benchmark_input.json")["streams"]
    (table,) = _tables("scaling.md", "Feeds")
    engines = ("ours", "grain", "torch")

    def speeds(name, workers):
        seconds = streams[name]["seconds"]
        medians = [np.median(np.divide(1, seconds[f"{e}, {workers} workers"])) for e in engines]
        return [f"{each:,.0f}" for each in medians]

    def starts(workers, digits):
        found = streams["large"]["starts"]
        return [f"{np.median(found[f'{e}, {workers} workers']):.{digits}f}" for e in engines]

    expected = [speeds("small", 0), speeds("small", 2), speeds("large", 0), speeds("large", 2)]
    assert [row[2:] for row in table[2:]] == [*expected, starts(0, 2), starts(2, 1)]


def test_aggregators_beside_torchjd_are_what_was_measured():
    recorded = _recorded("aggregators.json")["aggregators"]
    table = next(t for t in _all_tables("aggregators.md") if "largest difference" in t[0])
    assert table[2:] == [
        [
            name,
            str(each["matrices"]),
            f"{each['largest']:.0e}",
            f"{each['median']:.0e}",
            "{:.4f} to {:.4f}".format(*each["ratios"]),
            f"{each['ours_us']:.0f}",
            f"{each['torchjd_us']:.0f}",
        ]
        for name, each in recorded.items()
    ]


def test_how_aggregators_differ_is_what_was_measured():
    found = _recorded("aggregators.json")["aggregators"]
    longer = {name: 1 / found[name]["ratios"][0] - 1 for name in ("MGDA", "MGDA, 10,000 turns")}
    solves = found["NashMTL, where it solves"]["matrices"]
    text = _prose("aggregators.md")
    for said in (
        f"longer by up to {100 * longer['MGDA']:.0f} %. With 10,000 steps that is"
        f" {100 * longer['MGDA, 10,000 turns']:.1f} %",
        f"With 1e-12 in torchjd the largest difference is"
        f" {_scientific(found['UPGrad, reg_eps 1e-12']['largest'], 0)}",
        f"the largest difference is {_scientific(found['CAGrad']['largest'], 0)}",
        f"in {100 - solves} of the 100 matrices torchjd's solver",
        f"In the other {solves} they agree",
    ):
        assert said in text


def test_compiling_takes_what_was_measured(benchmark):
    recorded = _recorded("benchmark_compiling.json")
    assert benchmark("compiling").report(recorded) in (RESULTS / "auxnet.md").read_text()


def test_supervision_of_layers_is_what_was_measured():
    recorded, text = _recorded("auxnet_gradients.json"), _prose("auxnet.md")
    ratios = {k: np.asarray(v) for k, v in recorded["supervision"].items()}
    assert f"({100 * recorded['top_1']['main']:.1f}% accuracy" in text
    said = "to {:.2f} and {:.2f} at the first".format(*(ratios[k][0] for k in ("main", "joint")))
    assert said in text
    separate = ratios["multiway"]
    assert f"between {separate.min():.2f} and {separate.max():.2f}, and is 1 at each output" in text
    layers = recorded["supervision"]["layers"]
    at_outputs = separate[[layers.index(layer) for layer in (15, 25, 35, 45, 55)]]
    np.testing.assert_allclose(at_outputs, 1, atol=1e-3)
    np.testing.assert_allclose(ratios["effective_joint"], ratios["joint"], rtol=0.03)


def test_what_outputs_agree_on_is_what_was_measured():
    parts, text = _recorded("auxnet_gradients.json")["conflict"], _prose("auxnet.md")
    pairs = {}
    for part in parts:
        cosines = np.asarray(part["cosines"])
        for i, j in zip(*np.triu_indices(len(cosines), 1), strict=True):
            pair = part["losses"][i], part["losses"][j]
            pairs.setdefault(pair, []).append(cosines[i, j])
    last = pairs["exit_45", MAIN]
    assert f"the last two do ({min(last):.2f} to {max(last):.2f})" in text
    others = [c for pair, each in pairs.items() if "exit_15" not in pair for c in each]
    assert f"all but the first more or less ({min(others):.2f} and above)" in text
    first = [c for pair, each in pairs.items() if "exit_15" in pair for c in each]
    assert f"the others' ({min(first):.2f} to {max(first):.2f})" in text


def test_early_exits_are_what_was_measured():
    found, text = _recorded("auxnet_early_exit.json"), _prose("auxnet.md")
    used, whole = found["multiply_adds"] / 1e6, found["whole"]["multiply_adds"] / 1e6
    assert f"at {used:.2f} M of {whole:.2f} M multiply-adds an image" in text
    assert found["accuracy"] == found["whole"]["accuracy"]
    assert f"that of the whole network, {found['accuracy']:.3f};" in text
    as_good = [p["multiply_adds"] for p in found["curve"] if p["accuracy"] == found["accuracy"]]
    assert f"it still is at {min(as_good) / 1e6:.2f} M" in text


def test_what_a_checkpoint_costs_is_what_was_measured():
    found = _recorded("benchmark_scaling.json")["checkpoints"]
    text, seconds = _prose("scaling.md"), np.concatenate(list(found["seconds"].values()))
    spent = {name: np.mean(each) for name, each in found["processor_seconds"].items()}
    of_a_save = (spent["saving"] - spent["not saving"]) / found["saves_a_round"]
    for said in (
        f"{found['megabytes']:.1f} MB of state. `save()` blocks for {found['blocking_ms']:.0f} ms",
        f"saving costs **{100 * found['processor_overhead']:.1f}%**",
        f"the median is {100 * found['overhead']:+.1f}%",
        f"between {seconds.min():.1f} and {seconds.max():.1f} s",
        f"A save takes {of_a_save:.1f} s of the processor",
    ):
        assert said in text


def test_the_feed_on_the_device_is_what_was_measured():
    seconds = _recorded("benchmark_input.json")["step"]["seconds"]
    step, lookup, shuffle = (1e3 * np.median(seconds[k]) for k in ("step", "lookup", "shuffle"))
    text = _prose("scaling.md")
    assert f"{step:.0f} ms in that run, looking a batch up {lookup:.2f} ms" in text
    assert f"shuffling an epoch {shuffle:.2f} ms a step" in text
    assert f"**{100 * (lookup + shuffle) / step:.3f}% of the step" in text


def test_the_residual_runs_one_by_one_are_what_was_recorded():
    row = _recorded("pairs_1-as_released.json")["rows"][-1]
    again = row["one_by_one"]["test_acc"]
    assert "H100" in row["machine"]["devices"]
    assert "give {:.3f} ± {:.3f}".format(*again["ours"]) in _prose("pairs.md")
    assert len(again["runs"]) == len(row["test_acc"]["runs"]) == 10


def test_speed_of_pairs_beside_pytorch_is_what_was_measured():
    (table,) = _tables("pairs.md", "Speed beside PyTorch")
    for (_, *cells), name in zip(table[2:], ("", "_no_evaluation"), strict=True):
        (found,) = _recorded(f"benchmark_pairs{name}.json")["rounds"]
        (ours, accuracies), (theirs, others) = found["sire_jax"], found["PyTorch eager"]
        assert cells == [f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}"]
        both = [f"{np.mean(x):.3f} ± {np.std(x, ddof=1):.3f}" for x in (accuracies, others)]
        assert "Test accuracies of the two agree ({} and {})".format(*both) in _prose("pairs.md")


# ---- Groups of CIFAR-100's labels.

GROUPS = REPOSITORY / "configs" / "groups"


@pytest.fixture(scope="module")
def confused():
    """The counts and the names of the labels."""
    return groups.confusion.read(GROUPS / "cifar100_confusions.csv")


def test_groups_that_are_shipped_are_those_of_the_counts_beside_them(confused):
    counts, names = confused
    for criterion in clustering.CRITERIA:
        shipped = groups.load(GROUPS / f"cifar100_{criterion}.json")
        assert list(shipped) == [2, 4, 10, 20, 30, 33, 50]
        assert groups.make(counts, names, list(shipped), criterion) == shipped


def test_how_often_labels_are_confused_is_what_was_counted(confused):
    counts, _ = confused
    text = (GROUPS / "README.md").read_text()
    table = _tables_of(text.partition("## How often labels are confused")[2])[0]
    shipped = [groups.load(GROUPS / f"cifar100_{each}.json") for each in clustering.CRITERIA]
    assert [int(row[0]) for row in table[2:]] == list(shipped[0])
    for number, *cells in table[2:]:
        each = [groups.mean_confusion(counts, g[int(number)].assignment) for g in shipped]
        assert cells == [f"{rate:.4f}" for pair in each for rate in pair]
    right = f"{100 * counts.trace() / counts.sum():.1f}%"
    assert f"({right} of them right)" in text
    assert f"right on {right} of held-out images" in _prose("ssal.md")


def test_groups_that_the_page_shows_are_shipped():
    shipped = groups.load(GROUPS / "cifar100_join.json")
    named = [{_shown_label(name) for name in group} for group in shipped[20].labels()]
    section = (RESULTS / "ssal.md").read_text().partition("## Groups\n")[2].partition("\n## ")[0]
    (table,) = _tables_of(section)
    left_over = re.findall(r"\*([\w ,]+)\*", " ".join(section.split()))
    shown = [cell for row in table[2:] for cell in row] + left_over
    assert len(shown) > 8
    for each in shown:
        assert set(each.removesuffix(" tree").split(", ")) in named
    assert "Of 100 labels in 33 groups 32 have three and one has four" in _prose("ssal.md")
    assert sorted(np.bincount(shipped[33].assignment)) == [3] * 32 + [4]


def _shown_label(name):
    return name.removesuffix("_tree").replace("_", " ")


# ---- Sizes.


def test_sizes_of_sire_are_what_was_counted():
    counted = _recorded("sizes.json")
    for table, name in zip(_tables("sire.md", "Sizes"), ("sire_3", "sire_4"), strict=True):
        rows = {row["name"]: row for row in _rows(name)}
        for row, paper, ours in table[2:]:
            assert ours == f"{counted[name][rows[row]['id']]:,}", row
            assert paper == f"{rows[row]['parameters']} M", row


def test_sizes_of_what_table_4_trains_are_what_was_counted():
    sizes = _recorded("sizes.json")["sire_4, as trained"]
    said = "(VGG16 {:.1f} M, with decoders {:.1f} M)"
    assert said.format(sizes["vgg16_base"] / 1e6, sizes["vgg16"] / 1e6) in _prose("sire.md")


def _rows(name):
    table = paper_tables.load_table(name, configuration.repository_configs())
    return [{**row, "id": paper_tables.identity(row)} for row in table["rows"]]


# Of each row of the page the table and the row; after "+" what it adds to the one above.
SSAL_SIZES = {
    "ResNet18": ("ssal_1", "resnet18-0"),
    "+ branch 1 (20 groups, after stage 1)": ("ssal_1", "resnet18-1", "resnet18-0"),
    "+ branch 2 (50 groups, after stage 2)": ("ssal_1", "resnet18-2", "resnet18-1"),
    "ResNet50": ("ssal_1", "resnet50-0"),
    "ResNet50 + branch 1": ("ssal_1", "resnet50-1", "resnet50-0"),
    "ResNet50 + three branches": ("ssal_1", "resnet50-3", "resnet50-0"),
    "WRN-28-10": ("ssal_1", "wrn28_10-0"),
    "WRN-28-10 + one branch": ("ssal_1", "wrn28_10-1", "wrn28_10-0"),
    "WRN-28-10 + three branches": ("ssal_1", "wrn28_10-3", "wrn28_10-0"),
    "SE-WRN-16-8": ("ssal_3", "se_wrn16_8-0"),
    "SE-WRN-16-8 + three branches": ("ssal_3", "se_wrn16_8"),
    "DenseNet-BC-190-40": ("ssal_3", "densenet190_40-0"),
    "DenseNet-BC-190-40 + three branches": ("ssal_3", "densenet190_40"),
    "WideResNet18, 200 classes": ("ssal_2", "wide_resnet18"),
    "DeepResNet18": ("ssal_2", "deep_resnet18"),
    "DWResNet18": ("ssal_2", "dw_resnet18"),
    "GapCatNoSSAL": ("ssal_2", "gap_cat"),
    "CatFCNoSSAL": ("ssal_2", "cat_fc"),
    "SSAL x1": ("ssal_2", "ssal_1"),
    "SSAL x3": ("ssal_2", "ssal_3"),
}


def test_sizes_of_ssal_are_what_was_counted():
    counted, network, seen = _recorded("sizes.json"), "", []
    (table,) = _tables("ssal.md", "Sizes")
    for row, paper, as_keras, ours in table[2:]:
        network = network if row.startswith("+") else row
        key = row if row in SSAL_SIZES else f"{network} {row}"
        name, *rows = SSAL_SIZES[key]
        sign = "+" if len(rows) > 1 else ""
        for shown, column, digits in ((ours, name, 3), (as_keras, f"{name}, as Keras counts", 2)):
            larger, *smaller = (counted[column][each] for each in rows)
            assert shown == f"{sign}{(larger - sum(smaller)) / 1e6:.{digits}f}", key
        printed = {each["id"]: each["parameters"] for each in _rows(name)}
        larger, *smaller = (printed[each] for each in rows)
        digits = len(paper.partition(".")[2])
        assert paper == f"{sign}{larger - sum(smaller):.{digits}f}", key
        seen.append(key)
    assert seen == list(SSAL_SIZES)


def test_costs_of_exits_are_what_was_counted():
    counted = _recorded("sizes.json")["auxnet.py:56-5"]
    (table,) = _tables("auxnet.md", "Sizes and costs")
    whole = counted["main"]["multiply_adds"]
    for (row, _, parameters, adds, share), output in zip(
        table[2:], ("exit_15", "exit_25", "exit_35", "exit_45", "main"), strict=True
    ):
        each = counted[output]
        assert row == f"output {56 if output == 'main' else output.removeprefix('exit_')}"
        assert [parameters, adds] == [f"{each['parameters']:,}", f"{each['multiply_adds']:,}"]
        part = each["multiply_adds"] / whole
        assert share == ("1" if part == 1 else f"{part:.2f}".removeprefix("0"))


@pytest.mark.slow  # It traces networks of full size.
@pytest.mark.parametrize(
    ("table", "row"), [("sire_3", "ae_1"), ("sire_4", "googlenet_base"), ("ssal_1", "resnet18-2")]
)
def test_what_was_counted_is_what_the_code_makes(benchmark, monkeypatch, table, row):
    counting, recorded = benchmark("sizes"), _recorded("sizes.json")
    loaded = paper_tables.load_table(table, configuration.repository_configs())
    one = {**loaded, "rows": paper_tables.choose_rows(loaded, [row])}
    monkeypatch.setattr(paper_tables, "load_table", lambda *_: one)
    for name, counted in counting.count(table).items():
        assert counted == {row: recorded[name][row]}


def test_what_reconstructions_show_is_what_was_recorded():
    recorded, text = _recorded("sire_reconstructions.json"), _prose("sire.md")
    (table,) = _tables("sire.md", "Fig. 2, reduced")
    errors = {
        row["name"]: [row[f"decoder_{i}_mse"]["ours"][0] for i in range(1, 5)]
        for row in recorded["table"]
    }
    assert {row[0]: row[1:] for row in table[2:]} == {
        name: [f"{x:.1e}" for x in values] for name, values in errors.items()
    }
    assert f"--images={','.join(map(str, recorded['images']))} " in text
    shown = [row["classified"] for row in recorded["rows"].values()]
    changed = [a.split(" (")[0] != b.split(" (")[0] for a, b in zip(*shown, strict=True)]
    assert "two of four change, the tiger from the right one and the other from one wrong" in text
    right = [["\n" not in text for text in row] for row in shown]
    assert [
        pair for pair, other in zip(zip(*right, strict=True), changed, strict=True) if other
    ] == [
        (True, False),
        (False, False),
    ]
    assert shown[0][changed.index(True)].startswith("tiger (")
    ire, sire = (row["top_1_error"]["ours"][0] for row in recorded["table"])
    assert f"(errors of {ire:.1f}% without and {sire:.1f}% with them)" in text


# ---- What pages say in words.


def _by_name(name):
    return {row["name"]: row for row in _recorded(name)["rows"]}


def test_what_was_read_out_of_pairs_is_what_was_measured():
    text = _prose("pairs.md")
    reported, choices = _by_name("pairs_1.json"), _by_name("pairs_choices.json")
    deviations = {name: f"{row['test_acc']['deviations']:+.1f}" for name, row in reported.items()}
    both = deviations["Conv"], deviations["Conv + Augment"]
    assert "(test {} and {} sd as reported)".format(*both) in text
    assert f"*Aux a = 0.1* (test {deviations['Aux a = 0.1']} sd)" in text
    training = {name: row["train_acc"]["ours"] for name, row in choices.items()}
    test = {name: row["test_acc"]["ours"] for name, row in choices.items()}
    assert "(training {:.3f} ± {:.3f})".format(*training["Conv, whole-set batches"]) in text
    assert f"(training {training['Conv, unscaled pixels'][0]:.3f}), both" in text
    assert f"({training['Conv, both'][0]:.3f}), which are the printed figures" in text
    plain, swapped = (reported[name]["test_acc"]["ours"][0] for name in ("Conv", "Conv + Augment"))
    assert (
        f"(training {reported['Conv']['train_acc']['ours'][0]:.3f}) and still reach {plain:.3f}"
        in text
    )
    assert f"the swap then raises test accuracy ({swapped:.3f})" in text
    dense = [reported[name]["train_acc"]["paper"][0] for name in ("Dense BCE", "Dense MSE")]
    assert "training accuracies of {:.3f} and {:.3f} in 20 epochs".format(*dense) in text
    residual = reported["Residual"]["test_acc"]
    printed = "{:.3f} ± {:.3f} against {:.3f} ± {:.3f}".format(
        *residual["ours"], *residual["paper"]
    )
    assert f"less scattered: {printed}" in text
    released = choices["Aux a = 0.1, released loss"]["digit_acc"]
    assert "the ten runs scatter by nine points" in text
    assert round(100 * released["ours"][1]) == 9
    assert "is 12 points lower still" in text
    assert round(100 * (released["ours"][0] - released["paper"][0])) == 12
    assert test["Conv"][0] == pytest.approx(plain, abs=2e-3)


def test_what_papers_print_is_what_the_tables_of_configs_have():
    def table(name):
        rows = paper_tables.load_table(name, configuration.repository_configs())["rows"]
        return {row["name"]: row for row in rows}

    papers = table("sire_1")
    for row in _tables("sire.md", "Table 1, reduced")[0][2:]:
        printed = papers[row[0]]
        assert [float(row[1]), float(row[3])] == [printed["top_1_error"], printed["top_5_error"]]
    minutes = {name: row["minutes"] for name, row in table("sire_4").items()}
    text = _prose("sire.md")
    assert "train for 124 and 212 minutes in Table 1, and for 119 and 202 in Table 4" in text
    assert (papers["Baseline"]["minutes"], papers["SIRe-CNN"]["minutes"]) == (124, 212)
    assert (minutes["CNN"], minutes["SIRe-CNN"]) == (119, 202)
    assert "80% and 90% for VGG16 and VGG19 in Table 4 (336 over 187 minutes, 370 over 195)" in text
    pairs = [(minutes[f"SIRe-{name}"], minutes[name]) for name in ("VGG16", "VGG19")]
    assert pairs == [(336, 187), (370, 195)]
    assert [round(100 * (a / b - 1)) for a, b in pairs] == [80, 90]
    branches = table("ssal_2")
    assert "GapCatNoSSAL has 40.2 and the bare network 39.9" in _prose("ssal.md")
    assert branches["GapCatNoSSAL"]["combined"][0] == 40.2
    assert branches["ResNet18"]["main"][0] == 39.9
