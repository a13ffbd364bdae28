"""The page of SSAL and the groups that it uses are what the figures beside them say."""

import re

import numpy as np
import pages
import pytest

from sire_jax import groups
from sire_jax.groups import clustering


def test_the_cost_of_branches_is_what_was_measured():
    networks = pages.recorded("benchmark_ssal.json")["networks"]
    (table,) = pages.tables("ssal.md", "Cost of branches")
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
            "1" if is_bare else pages.spread(pages.ratios(found, step, f"{bare}: step")),
            ""
            if is_bare
            else pages.spread(
                pages.ratios(found, f"{variant}: all outputs", f"{bare}: main alone")
            ),
            "1" if is_bare else pages.spread(pages.ratios(found, main, f"{bare}: main alone")),
        ]
        assert [peak, plan] == [
            f"{x / 2**20:.0f}" for x in (facts["memory"], facts["plan"]["step"])
        ]
        assert compiling == f"{facts['compile_seconds']['step']:.0f}"


def test_what_is_said_of_branches_costs_is_what_was_counted():
    adds = pages.recorded("benchmark_ssal.json")["networks"]["resnet18"]["multiply_adds"]
    sizes = pages.recorded("sizes.json")["ssal_1"]
    of_size = 100 * (1 - sizes["resnet18-0"] / sizes["resnet18-2"])
    of_adds = 100 * (1 - adds["resnet18,0"] / adds["resnet18"])
    said = f"have {of_size:.0f}% of the parameters and {of_adds:.0f}% of the multiply-adds"
    assert f"ResNet18's two {said}" in pages.prose("ssal.md")


def test_branches_against_none_are_what_reproduce_wrote():
    rows = pages.recorded("ssal_1-reduced.json")["rows"]
    table = pages.tables("ssal.md", "Branches against none")[0]
    columns = ("main", "joint_eta_1", "linear")
    assert [row[1:4] for row in table[2:]] == [
        [pages.mean(row[c]) for c in columns] for row in rows
    ]


def test_what_a_linear_combination_is_fitted_to_is_what_was_measured():
    (seed,), text = pages.recorded("joint_prediction-overfit.json")["seeds"], pages.prose("ssal.md")
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
    images, text = pages.recorded("ssal_maps.json")["images"], pages.prose("ssal.md")
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
    seeds, text = pages.recorded("joint_prediction.json")["seeds"], pages.prose("ssal.md")
    found = {name: np.asarray([each[name] for each in seeds]) for name in seeds[0]}
    table = pages.tables("ssal.md", "Branches against none")[1]
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
    bare, branched = pages.recorded("ssal_1-reduced.json")["rows"]
    gains = np.subtract(branched["main"]["runs"], bare["main"]["runs"])
    assert "by {:.1f}, {:.1f} and {:.1f} points in the three seeds, **and".format(*gains) in text
    linear, alone = found["linear"].mean(), found["linear, main alone"]
    assert f"combination gains {linear - bare['main']['ours'][0]:.1f} points" in text
    said = f"it has {alone.mean():.2f} ({{:.2f}}, {{:.2f}} and {{:.2f}} in the three seeds)"
    assert said.format(*alone) in text
    assert f"{linear - alone.mean():.1f} point is theirs" in text


GROUPS = pages.REPOSITORY / "configs" / "groups"


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
    table = pages.tables_of(text.partition("## How often labels are confused")[2])[0]
    shipped = [groups.load(GROUPS / f"cifar100_{each}.json") for each in clustering.CRITERIA]
    assert [int(row[0]) for row in table[2:]] == list(shipped[0])
    for number, *cells in table[2:]:
        each = [groups.mean_confusion(counts, g[int(number)].assignment) for g in shipped]
        assert cells == [f"{rate:.4f}" for pair in each for rate in pair]
    right = f"{100 * counts.trace() / counts.sum():.1f}%"
    assert f"({right} of them right)" in text
    assert f"right on {right} of held-out images" in pages.prose("ssal.md")


def test_groups_that_the_page_shows_are_shipped():
    shipped = groups.load(GROUPS / "cifar100_join.json")
    named = [{_shown_label(name) for name in group} for group in shipped[20].labels()]
    section = (
        (pages.RESULTS / "ssal.md").read_text().partition("## Groups\n")[2].partition("\n## ")[0]
    )
    (table,) = pages.tables_of(section)
    left_over = re.findall(r"\*([\w ,]+)\*", " ".join(section.split()))
    shown = [cell for row in table[2:] for cell in row] + left_over
    assert len(shown) > 8
    for each in shown:
        assert set(each.removesuffix(" tree").split(", ")) in named
    assert "Of 100 labels in 33 groups 32 have three and one has four" in pages.prose("ssal.md")
    assert sorted(np.bincount(shipped[33].assignment)) == [3] * 32 + [4]


def _shown_label(name):
    return name.removesuffix("_tree").replace("_", " ")


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
    counted, network, seen = pages.recorded("sizes.json"), "", []
    (table,) = pages.tables("ssal.md", "Sizes")
    for row, paper, as_keras, ours in table[2:]:
        network = network if row.startswith("+") else row
        key = row if row in SSAL_SIZES else f"{network} {row}"
        name, *rows = SSAL_SIZES[key]
        sign = "+" if len(rows) > 1 else ""
        for shown, column, digits in ((ours, name, 3), (as_keras, f"{name}, as Keras counts", 2)):
            larger, *smaller = (counted[column][each] for each in rows)
            assert shown == f"{sign}{(larger - sum(smaller)) / 1e6:.{digits}f}", key
        printed = {each["id"]: each.get("parameters") for each in pages.rows(name)}
        larger, *smaller = (printed[each] for each in rows)
        digits = len(paper.partition(".")[2])
        assert paper == f"{sign}{larger - sum(smaller):.{digits}f}", key
        seen.append(key)
    assert seen == list(SSAL_SIZES)
