"""The page of pairs of digits says what the recorded figures beside it say."""

import numpy as np
import pages
import pytest

from sire_jax import decide
from sire_jax.attribution import plan


def test_figures_between_the_lines_of_pairs_are_of_its_tables():
    rows = {row["variant"]: row for row in pages.recorded("pairs_choices.json")["rows"]}
    text = (pages.RESULTS / "pairs.md").read_text().partition("## One choice at a time")[0]
    said = text.partition("## What we read out of it")[2]
    conv = ("conv_whole", "conv_unscaled", "conv_both", "conv_bn", "conv_bn_affine")
    augment = ("conv_augment_whole", "conv_augment_unscaled", "conv_augment_both")
    auxiliary = ("aux_0.1_loss", "aux_0.1_unscaled", "aux_10", "shared_no_bn")
    for variant in (*conv, *augment, *auxiliary):
        assert "{:.3f} ± {:.3f}".format(*rows[variant]["test_acc"]["ours"]) in said, variant
    assert "{:.3f} ± {:.3f}".format(*rows["aux_10"]["order"]["ours"]) in said
    accuracies = {
        row["variant"]: [f"{each:.3f}" for each in row["test_acc"]["ours"]]
        for row in pages.recorded("pairs_1.json")["rows"]
    }
    for variant in ("residual", "resless"):
        assert " ± ".join(accuracies[variant]) in said
    apart = float(accuracies["aux_10"][0]) - float(accuracies["aux_0.1"][0])
    assert f"a = 0.1 comes within {apart:.3f} of a = 10" in " ".join(said.split())


def test_the_residual_runs_one_by_one_are_what_was_recorded():
    row = pages.recorded("pairs_1-as_released.json")["rows"][-1]
    again = row["one_by_one"]["test_acc"]
    assert "H100" in row["machine"]["devices"]
    assert "give {:.3f} ± {:.3f}".format(*again["ours"]) in pages.prose("pairs.md")
    assert len(again["runs"]) == len(row["test_acc"]["runs"]) == 10


def test_speed_of_pairs_beside_pytorch_is_what_was_measured():
    (table,) = pages.tables("pairs.md", "Speed beside PyTorch")
    seconds = {}
    for (_, *cells), name in zip(table[2:], ("", "_at_once", "_no_evaluation"), strict=True):
        (found,) = pages.recorded(f"benchmark_pairs{name}.json")["rounds"]
        (ours, accuracies), (theirs, others) = found["sire_jax"], found["PyTorch eager"]
        seconds[name] = ours, theirs
        assert cells == [f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}"]
        both = [f"{np.mean(x):.3f} ± {np.std(x, ddof=1):.3f}" for x in (accuracies, others)]
        if name != "_at_once":
            assert "Test accuracies of the two agree ({} and {})".format(*both) in pages.prose(
                "pairs.md"
            )
    (ours, theirs), (ours_at_once, theirs_at_once) = seconds[""], seconds["_at_once"]
    text = pages.prose("pairs.md")
    assert f"take {ours_at_once / ours:.2f} of the time that they take" in text
    assert f"started before ({theirs_at_once / theirs:.2f})" in text
    assert f"plain loop ours are at {ours_at_once / theirs:.2f} so" in text


def test_the_profile_of_a_step_of_pairs_is_what_was_measured():
    (profile,) = pages.recorded("benchmark_profile_pairs.json")["results"].values()
    (table,) = pages.tables("pairs.md", "Where a step of pairs spends its time")
    lasted = profile.pop("step")
    whole = sum(profile.values())
    expected = [[kind, f"{ms:.2f}", f"{ms / whole:.0%}"] for kind, ms in profile.items()]
    assert table[2:-2] == expected
    assert [row[1] for row in table[-2:]] == [f"{whole:.2f}", f"{lasted:.2f}"]


@pytest.mark.parametrize("name", ["pairs_1", "pairs_1-as_released", "pairs_1-fashion"])
def test_claims_of_pairs_are_what_was_decided(name):
    assert decide.markdown(pages.decided(f"{name}-claims.json")) in pages.whole("pairs.md")


def test_the_worth_of_the_digits_is_what_was_measured():
    stored = pages.recorded("pairs_worth.json")
    measured = {int(seed): values for seed, values in stored["measured"].items()}
    found = plan.collect(stored["metric"], stored["objectives"], 0, measured)
    assert str(found) in (pages.RESULTS / "pairs.md").read_text()


def _by_name(name):
    return {row["name"]: row for row in pages.recorded(name)["rows"]}


def test_what_was_read_out_of_pairs_is_what_was_measured():
    text = pages.prose("pairs.md")
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


def test_the_parts_of_a_whole_run_are_what_was_measured():
    seconds = pages.recorded("benchmark_pairs_whole.json")["seconds"]
    total = sum(seconds.values())
    steps, measured, compiled, rest = (f"{value / total:.0%}" for value in seconds.values())
    said = pages.prose("pairs.md")
    assert f"({total:.1f} s from config to last measurement;" in said
    assert f"the steps are {steps}, 71 measurements of all pairs {measured}," in said
    assert (
        f"tracing and compiling {compiled}, and data, start, checkpoints and curves {rest}" in said
    )
