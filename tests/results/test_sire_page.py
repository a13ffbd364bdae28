"""The page of SIRe says what the recorded figures beside it say."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pages
import pytest

from sire_jax import text
from sire_jax.layers import convolution


def _decoders(row):
    """The decoders' mean loss of each step."""
    return np.mean([each for k, each in row["losses"].items() if k.startswith("decoder")], axis=0)


def test_three_hundred_steps_are_what_was_recorded():
    recorded = pages.recorded("sire_4-rehearsal.json")["rows"]
    (table,) = pages.tables("sire.md", "Three hundred steps as shipped")
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
    recorded, said = pages.recorded("sire_4-rehearsal.json")["rows"], pages.prose("sire.md")
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
    assert "--option=linear,he" in pages.recorded("sire_1-reduced.json")["note"]


def test_what_classification_does_is_what_was_recorded():
    recorded = pages.recorded("sire_classification.json")["rows"].values()
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
    (table,) = pages.tables("sire.md", "What classification does")
    assert {tuple(row) for row in table[2:]} == found


def test_how_long_classification_stays_at_guessing_is_what_was_recorded():
    rows = pages.recorded("sire_classification.json")["rows"]

    def steps_at_guessing(name):
        row = rows[name]
        return sum(loss > 4.59 for loss in row["main"]) * row["steps"] // len(row["main"])

    stays = f"initial values it stays there for {steps_at_guessing('re, longer')} steps"
    assert stays in pages.prose("sire.md")
    assert steps_at_guessing("re, PyTorch's initial values, longer") < 100
    assert "with PyTorch's for fewer than 100;" in pages.prose("sire.md")


def test_the_maps_of_what_trains_are_what_was_recorded(benchmark):
    stability, said = benchmark("stability"), (pages.RESULTS / "sire.md").read_text()
    for chosen in stability.MAPS:
        recorded = pages.recorded(f"{chosen.name}.json")
        assert (recorded["steps"], recorded["batch_size"]) == (chosen.steps, chosen.batch)
        assert set(recorded["rows"]) == {called for *_, called in chosen.cells()}
        for width in chosen.widths:
            assert text.align(stability.rows(chosen, recorded["rows"], width)) in said


def test_what_is_said_of_readings_is_what_was_recorded(benchmark):
    stability, rows = benchmark("stability"), pages.recorded("sire_readings.json")["rows"]
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
    assert f"errors of {min(errors):.4f} to {max(errors):.4f}" in pages.prose("sire.md")


def test_a_cell_of_the_map_says_what_became_of_a_row(benchmark):
    cell = benchmark("stability").cell
    finite = {"refused": "", "diverged": None, "losses": {"main": [9.0, 4.0, 4.0, 4.0, 4.0, 4.5]}}
    assert cell(finite) == "4.10"
    assert cell({**finite, "diverged": 7}) == "NaN at 7"
    assert (
        cell({"refused": "too big for this machine", "diverged": None, "losses": {}}) == "too big"
    )
    assert cell(None) == ""


def test_a_row_that_diverges_was_recorded():
    fine, diverged = pages.recorded("sire_2-reduced.json")["rows"]
    assert (fine["variant"], fine["diverged"]) == ("lambda_0.2", [None])
    assert (diverged["variant"], diverged["diverged"]) == ("lambda_0.5", [8])
    assert fine["top_1_error"]["ours"][0] == pytest.approx(99, abs=1)
    assert diverged["top_1_error"]["ours"][0] == 100


def test_table_1_of_sire_reduced_is_what_reproduce_wrote():
    recorded = pages.recorded("sire_1-reduced.json")
    rows = recorded["rows"]
    (table,) = pages.tables("sire.md", "Table 1, reduced")
    for shown, row in zip(table[2:], rows, strict=True):
        assert shown[0] == row["name"]
        for cell, column in ((2, "top_1_error"), (4, "top_5_error")):
            assert shown[cell] == pages.mean(row[column])
        errors = recorded["decoder_mse"].get(row["variant"], {})
        means = [np.mean(errors.get(f"decoder_{i}/loss", np.nan)) for i in (1, 2, 3, 4)]
        assert shown[5:] == ["" if np.isnan(each) else pages.scientific(each) for each in means]
    errors = {row["variant"]: np.asarray(row["top_1_error"]["runs"]) for row in rows}
    apart = errors["sire"] - errors["base"]
    deviations = [each.std(ddof=1) for each in (errors["sire"], errors["base"])]
    error = np.hypot(*deviations) / np.sqrt(len(apart))
    said = f"SIRe-CNN is {apart.mean():.1f} points *above* the baseline, about two standard errors"
    assert said in pages.prose("sire.md")
    assert round(apart.mean() / error) == 2


def test_the_flow_of_gradients_is_what_was_measured():
    recorded, said = pages.recorded("sire_figure_3-reduced.json"), pages.prose("sire.md")
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
    results = pages.recorded("benchmark_sire.json")["results"]
    table = pages.tables("sire.md", "Speed beside PyTorch")[0]
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
    recorded = pages.recorded("benchmark_sire.json")
    found = {(r["network"], r["engine"], r["dtype"], r["remat"]): r for r in recorded["results"]}

    def seconds(network, engine, dtype="float32"):
        rounds = found[network, engine, dtype, False]["rounds"]
        return np.asarray([each["seconds"] for each in rounds])

    def ratios(a, b):
        return [np.median(seconds(n, a) / seconds(n, b)) for n in ("base", "sire")]

    text = pages.prose("sire.md")
    layers = pages.recorded("benchmark_convolution.json")
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
    profile, results = (
        benchmark("profile_step"),
        pages.recorded("benchmark_profile.json")["results"],
    )
    assert profile.report(results) in (pages.RESULTS / "sire.md").read_text()
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


def test_convolutions_beside_pytorch_are_what_was_measured():
    recorded = pages.recorded("benchmark_convolution.json")
    text = (pages.RESULTS / "sire.md").read_text()
    rows = re.findall(r"^  \| (\d+) px, (\d+) to (\d+) (.*)\|$", text, flags=re.MULTILINE)
    for (*layer, cells), each in zip(rows, recorded, strict=True):
        assert [int(n) for n in layer] == [each[k] for k in ("side", "channels", "features")]
        pairs = zip(each["ours"], each["torch"], strict=True)
        expected = [f"{x:.1f}" if x else "" for pair in pairs for x in pair]
        assert [cell.strip() for cell in cells.strip(" |").split("|")] == expected
    sums = np.sum([[each["ours"], each["torch"]] for each in recorded], 0).T.ravel()
    (total,) = re.findall(r"^  \| all, ms (.*)\|$", text, flags=re.MULTILINE)
    assert re.findall(r"[\d.]+", total) == [f"{each:.1f}" for each in sums]


def test_what_lies_between_convolutions_is_what_was_measured():
    recorded = pages.recorded("benchmark_between.json")
    text = (pages.RESULTS / "sire.md").read_text()
    for operation in {each["operation"] for each in recorded}:
        own = [each for each in recorded if each["operation"] == operation]
        cells = " | ".join(f"{each['ours']:.2f} / {each['torch']:.2f}" for each in own)
        assert f"| {operation} | {cells} |" in text
    ratio = {
        (each["operation"], each["side"], each["channels"]): each["ours"] / each["torch"]
        for each in recorded
    }
    widest = [v for (name, *size), v in ratio.items() if "norm" in name and size == [32, 64]]
    assert "widest layers it takes {:.2f} to {:.2f} of".format(*sorted(widest)) in " ".join(
        text.split()
    )
    pooled = max(value for (name, *_), value in ratio.items() if "pool" in name)
    assert f"takes up to {pooled:.1f} times as long as PyTorch's" in " ".join(text.split())


def test_sizes_of_sire_are_what_was_counted():
    counted = pages.recorded("sizes.json")
    for table, name in zip(pages.tables("sire.md", "Sizes"), ("sire_3", "sire_4"), strict=True):
        rows = {row["name"]: row for row in pages.rows(name)}
        for row, paper, ours in table[2:]:
            assert ours == f"{counted[name][rows[row]['id']]:,}", row
            assert paper == f"{rows[row]['parameters']} M", row


def test_sizes_of_what_table_4_trains_are_what_was_counted():
    sizes = pages.recorded("sizes.json")["sire_4, as trained"]
    said = "(VGG16 {:.1f} M, with decoders {:.1f} M)"
    assert said.format(sizes["vgg16_base"] / 1e6, sizes["vgg16"] / 1e6) in pages.prose("sire.md")


def test_what_reconstructions_show_is_what_was_recorded():
    recorded, text = pages.recorded("sire_reconstructions.json"), pages.prose("sire.md")
    (table,) = pages.tables("sire.md", "Fig. 2, reduced")
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


def test_steps_in_bfloat16_take_what_was_measured():
    steps = pages.recorded("benchmark_bfloat16.json")["parts"]["steps"]
    seconds = {
        (each["network"], each["dtype"]): np.array([turn["seconds"] for turn in each["rounds"]])
        for each in steps
    }
    sire, auxnet, ssal = (
        np.median(seconds[name, "bfloat16"] / seconds[name, "float32"])
        for name in ("sire", "auxnet", "ssal")
    )
    said = f"in another run {sire:.2f}, AuxNet-56-5 {auxnet:.2f} and ResNet18 with two branches"
    assert f"{said} {ssal:.2f} (" in pages.prose("sire.md")


def test_steps_without_onednn_are_what_was_measured_in_turns():
    rows = pages.recorded("benchmark_without_onednn.json")["rows"]
    found = {}
    for row in rows:
        found.setdefault(row["network"], []).append(np.median(row["milliseconds"]))
    said = pages.prose("sire.md")
    joint, multiway = found["AuxNet-56-5, joint"], found["AuxNet-56-5, multiway"]
    assert "joint {:.0f} before, {:.0f} now".format(*joint) in said
    assert "multi-way {:.0f} and {:.0f};".format(*multiway) in said
    assert "base CNN {:.0f} and {:.0f}, ".format(*found["base CNN"]) in said
    assert "SIRe-CNN {:.0f} and {:.0f};".format(*found["SIRe-CNN"]) in said
    pairs = np.array(found["pairs, ten networks"]) / 1000
    assert "from start to end, {:.1f} s and {:.1f} s".format(*pairs) in said
