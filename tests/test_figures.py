"""Pictures of several runs, by what is drawn in them."""

import json

import numpy as np
import pytest

from sire_jax.diagnostics import figures


def _write_run(directory, **accuracies):
    """Writes what a run of two seeds has measured in two epochs."""
    lines = [
        {
            **{"step": 10 * epoch, "epoch": epoch, "split": split},
            **{"main/top_1": values, "main/loss": [1.0, 1.0]},
        }
        for split, measured in accuracies.items()
        for epoch, values in enumerate(measured, start=1)
    ]
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return directory, "main/top_1"


@pytest.mark.parametrize(
    ("error_percent", "label", "test", "training"),
    [(False, "test accuracy", [0.3, 0.6], [0.5, 0.9]), (True, "test error, %", [70, 40], [50, 10])],
)
def test_tests_and_training_of_several_runs_are_drawn(
    error_percent, label, test, training, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    runs = {
        "one": _write_run(
            tmp_path / "one", test=[[0.2, 0.4], [0.5, 0.7]], train=[[0.5, 0.5], [0.8, 1.0]]
        ),
        "other": _write_run(tmp_path / "other", test=[[0.1, 0.1], [0.2, 0.2]]),
    }
    figures.compare(runs, "test", tmp_path / "table.png", error_percent)
    (axes,) = drawn[0].axes
    assert axes.get_ylabel() == label
    assert "dotted: training" in axes.get_title()
    one, dotted = (next(x for x in axes.lines if x.get_linestyle() == s) for s in ("-", ":"))
    np.testing.assert_allclose(one.get_ydata(), test)
    np.testing.assert_allclose(dotted.get_ydata(), training)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "other"]


def test_what_is_no_accuracy_has_no_error(tmp_path):
    directory, _ = _write_run(tmp_path / "one", test=[[0.2, 0.4]])
    with pytest.raises(ValueError, match=r"'main/loss' is no accuracy, .* choose <output>/top_1"):
        figures.compare({"one": (directory, "main/loss")}, "test", tmp_path / "table.png", True)
