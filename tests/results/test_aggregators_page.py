"""The page on aggregators beside torchjd says what the recorded figures say."""

import pages


def test_aggregators_beside_torchjd_are_what_was_measured():
    recorded = pages.recorded("aggregators.json")["aggregators"]
    table = next(
        t
        for t in pages.tables_of((pages.RESULTS / "aggregators.md").read_text())
        if "largest difference" in t[0]
    )
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
    found = pages.recorded("aggregators.json")["aggregators"]
    longer = {name: 1 / found[name]["ratios"][0] - 1 for name in ("MGDA", "MGDA, 10,000 turns")}
    solves = found["NashMTL, where it solves"]["matrices"]
    text = pages.prose("aggregators.md")
    for said in (
        f"longer by up to {100 * longer['MGDA']:.0f} %. With 10,000 steps that is"
        f" {100 * longer['MGDA, 10,000 turns']:.1f} %",
        f"With 1e-12 in torchjd the largest difference is"
        f" {pages.scientific(found['UPGrad, reg_eps 1e-12']['largest'], 0)}",
        f"the largest difference is {pages.scientific(found['CAGrad']['largest'], 0)}",
        f"in {100 - solves} of the 100 matrices torchjd's solver",
        f"In the other {solves} they agree",
    ):
        assert said in text
