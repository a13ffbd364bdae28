"""The page of AuxNet says what the recorded figures beside it say."""

import numpy as np
import pages
import pytest

from sire_jax import configuration
from sire_jax.configuration import experiment
from sire_jax.networks import MAIN
from sire_jax.updates.reached import Reached


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
        "1" if is_joint else pages.spread(pages.ratios(found, name, "joint")),
        "1" if required == 1 else f"{required:.2f}",
        f"{size / 2**20:.0f}" + ("" if is_joint else f" ({size / least:.2f})"),
        f"{facts['compile_seconds']:.{digits}f}",
    ]


def _timed_rules(network):
    """What was measured of the rules on a network of benchmark_updates.json."""
    parts = pages.recorded("benchmark_updates.json").values()
    (found,) = (each["networks"][network] for each in parts if network in each["networks"])
    return found


@pytest.mark.parametrize(("place", "network"), [(0, "56-5"), (5, "56-10")])
def test_the_cost_of_rules_is_what_was_measured(place, network):
    table = pages.tables("auxnet.md", "Cost of a step")[place]
    found = _timed_rules(network)
    assert table[2:] == [_rule(found, row[0], 0) for row in table[2:]]
    assert {row[0] for row in table[2:]} == set(found["facts"])


def test_the_cost_of_rules_on_two_outputs_is_what_was_measured():
    table = pages.tables("auxnet.md", "Cost of a step")[4]
    found = _timed_rules("20-2")
    for name, ratio, required, memory in table[2:]:
        if "," not in name:
            assert [ratio, required, memory] == _rule(found, name, 0)[2:5]
            continue
        rule, _, aggregators = name.partition(" + ")
        names = [f"{rule} + {each}" for each in aggregators.split(", ")]
        middles = [f"{np.median(pages.ratios(found, each, 'joint')):.2f}" for each in names]
        assert ratio == ", ".join(middles)
        assert required == f"{found['required']['multiway']:.2f}"
        assert memory in {_rule(found, each, 0)[4] for each in names}
    other = [
        np.median(pages.ratios(found, f"PyTorch {each}", "PyTorch joint"))
        for each in ("separate", "mtl_backward")
    ]
    said = "`autograd.grad` per output {:.2f}, TorchJD `mtl_backward` {:.2f} times its joint; ours"
    ours = pages.spread(pages.ratios(found, "joint", "PyTorch joint"))
    assert f"{said.format(*other)} / PyTorch's {ours}, too noisy to tell" in pages.prose(
        "auxnet.md"
    )


def test_rules_beside_pytorch_are_what_was_measured():
    table = pages.tables("auxnet.md", "Cost of a step")[1]
    found = _timed_rules("56-5")
    names = ["PyTorch joint", "PyTorch separate", "PyTorch mtl_backward", "PyTorch backward"]
    for name, (_, milliseconds, own, ours, relative) in zip(names, table[2:], strict=True):
        assert milliseconds == f"{1e3 * np.median(found['seconds'][name]):.0f}"
        assert own == (
            "1" if name == names[0] else pages.spread(pages.ratios(found, name, names[0]))
        )
        assert relative == pages.spread(pages.ratios(found, ours, name))


def test_what_is_said_of_the_cost_of_rules_is_what_was_measured():
    text = pages.prose("auxnet.md")
    found = _timed_rules("56-5")
    aggregated = [name for name in found["facts"] if " + " in name]
    quartiles = [np.quantile(pages.ratios(found, n, "multiway"), [0.5, 0.75]) for n in aggregated]
    middles, upper = np.transpose(quartiles)
    said = f"UPGrad and MGDA cost {middles.min():.2f} to {middles.max():.2f} times multi-way (upper"
    assert f"{said} quartile {upper.max():.2f})" in text
    sizes = {n: f["temporary_bytes"] + f["result_bytes"] for n, f in found["facts"].items()}
    of_joint = [sizes[name] / sizes["joint"] for name in ("pairwise", "multiway")]
    assert (
        "Pair-wise takes {:.1f} times the memory of joint and multi-way {:.2f}".format(*of_joint)
        in text
    )
    control = pages.spread(pages.ratios(found, "effective_joint", "joint"))
    assert f"but for a few scalars: {control} here" in text
    relative = np.median(pages.ratios(found, "joint", "PyTorch joint"))
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
    own, text = [weights[name] for name in exits], pages.prose("auxnet.md")
    said = "{:.3f}, {:.3f}, {:.3f} and {:.0f} in place of {:.3f}, {:.3f}, {:.3f} and {:.0f}"
    assert said.format(*effective, *own).replace("0.", ".") in text
    # The main output's share is 1.
    decays = [sum(shares[i:]) + 1 for i in range(len(exits))]
    assert "{:.2f}, {:.2f}, {:.2f} and {:.0f} times as large in".format(*decays) in text


def test_what_is_said_of_exits_by_rule_is_what_was_measured():
    probes, *rules = pages.recorded("auxnet_exits-reduced.json")["rows"]
    last = {row["variant"]: row["output_56"]["ours"][0] for row in (probes, *rules)}
    assert max(last.values()) - min(last.values()) <= 1.5
    assert max(last, key=last.get) == "multiway"
    assert min(last, key=last.get) == "effective_joint"
    first = [row["output_15"]["ours"][0] - probes["output_15"]["ours"][0] for row in rules]
    assert min(first) > 1
    # What the picture draws ends where the table does.
    for name, curve in pages.recorded("auxnet_exits-curves.json")["curves"].items():
        assert curve["epoch"] == list(range(1, 21))
        assert round(last[name], 2) == curve["test"][-1]
        assert max(curve["test"][0], curve["train"][0]) > 98


def test_how_rules_differ_in_each_seed_is_what_was_recorded():
    rows = pages.recorded("auxnet_rules-reduced.json")["rows"]
    errors = {row["variant"]: np.asarray(row["top_1_error"]["runs"]) for row in rows}
    worse = [
        [f"{each:.2f}" for each in errors["20-2-multiway"] - errors[f"20-2-{other}"]]
        for other in ("joint", "effective_joint")
    ]
    text = pages.prose("auxnet.md")
    assert "*worse*, by {}, {} and {} points in the three seeds".format(*worse[0]) in text
    assert "worse than its control, too, by {}, {} and {}:".format(*worse[1]) in text


def test_compiling_takes_what_was_measured(benchmark):
    recorded = pages.recorded("benchmark_compiling.json")
    assert benchmark("compiling").report(recorded) in (pages.RESULTS / "auxnet.md").read_text()


def test_supervision_of_layers_is_what_was_measured():
    recorded, text = pages.recorded("auxnet_gradients.json"), pages.prose("auxnet.md")
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
    parts, text = pages.recorded("auxnet_gradients.json")["conflict"], pages.prose("auxnet.md")
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
    found, text = pages.recorded("auxnet_early_exit.json"), pages.prose("auxnet.md")
    used, whole = found["multiply_adds"] / 1e6, found["whole"]["multiply_adds"] / 1e6
    assert f"at {used:.2f} M of {whole:.2f} M multiply-adds an image" in text
    assert found["accuracy"] == found["whole"]["accuracy"]
    assert f"that of the whole network, {found['accuracy']:.3f};" in text
    as_good = [p["multiply_adds"] for p in found["curve"] if p["accuracy"] == found["accuracy"]]
    assert f"it still is at {min(as_good) / 1e6:.2f} M" in text


def test_costs_of_exits_are_what_was_counted():
    counted = pages.recorded("sizes.json")["auxnet.py:56-5"]
    (table,) = pages.tables("auxnet.md", "Sizes and costs")
    whole = counted["main"]["multiply_adds"]
    for (row, _, parameters, adds, share), output in zip(
        table[2:], ("exit_15", "exit_25", "exit_35", "exit_45", "main"), strict=True
    ):
        each = counted[output]
        assert row == f"output {56 if output == 'main' else output.removeprefix('exit_')}"
        assert [parameters, adds] == [f"{each['parameters']:,}", f"{each['multiply_adds']:,}"]
        part = each["multiply_adds"] / whole
        assert share == ("1" if part == 1 else f"{part:.2f}".removeprefix("0"))


def test_auxnet_beside_pytorch_compiled_is_what_was_measured():
    table = pages.tables("auxnet.md", "Cost of a step")[2]
    seconds = pages.recorded("benchmark_updates_compiled.json")["networks"]["56-5"]["seconds"]
    names = ["joint", "compiled", "separate", "separate_compiled", "mtl_backward"]
    for name, (_, theirs, ours, own, relative) in zip(names, table[2:], strict=True):
        peer = f"PyTorch {name}"
        assert relative == pages.spread(pages.ratios({"seconds": seconds}, ours, peer))
        for each, written in ((peer, theirs), (ours, own)):
            assert written == f"{1000 * np.median(seconds[each]):.0f}"


def test_compiling_with_onednn_is_what_was_measured():
    trunks = pages.recorded("benchmark_compiling_onednn.json")["trunks"]
    said = ", ".join(
        "{} {:.1f} and {:.1f} s".format(name, ways["loops"]["make"], ways["loops"]["step"])
        for name, ways in trunks.items()
    )
    assert said in pages.prose("auxnet.md")


def test_convolutions_beside_pytorch_are_what_was_measured():
    table = pages.tables("auxnet.md", "Cost of a step")[3]
    recorded = pages.recorded("benchmark_convolution_auxnet.json")
    for (layer, *cells), each in zip(table[2:], recorded, strict=True):
        assert layer == "{side} px, {channels} to {features}".format(**each)
        pairs = zip(each["ours"], each["torch"], strict=True)
        assert cells == [f"{x:.2f}" if x else "" for pair in pairs for x in pair]
