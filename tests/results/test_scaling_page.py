"""The page on scaling says what the recorded figures beside it say."""

import numpy as np
import pages


def test_what_a_step_costs_by_its_size_is_what_was_measured(benchmark):
    text = (pages.RESULTS / "scaling.md").read_text()
    for curve, points in pages.recorded("benchmark_curves.json")["curves"].items():
        assert benchmark("curves").table(curve, points) in text


def test_what_devices_and_processes_cost_is_what_was_measured():
    (table,) = pages.tables("scaling.md", "Devices and processes")
    found = {
        (each["scaling"], each["unit"], each["number"], each["parallel"]): each
        for each in pages.recorded("benchmark_scaling.json")["scaling"]
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
    (table,) = pages.tables("scaling.md", "A GPU beside a CPU")
    apart = pages.recorded("accelerator.json")["apart"].values()
    assert [[float(cell) for cell in row[1:]] for row in table[2:]] == [
        [each[what] for what in ("losses", "moved", "outputs")] for each in apart
    ]


def test_restarts_take_what_was_measured():
    (table,) = pages.tables("scaling.md", "Restart")
    recorded = pages.recorded("benchmark_scaling.json")["restart"]
    expected = [[f"{each[k]:.1f} s" for k in ("compiled", "loaded")] for each in recorded]
    assert [row[1:] for row in table[2:]] == expected


def test_feeds_are_what_was_measured():
    streams = pages.recorded("benchmark_input.json")["streams"]
    (table,) = pages.tables("scaling.md", "Feeds")
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


def test_what_a_checkpoint_costs_is_what_was_measured():
    found = pages.recorded("benchmark_scaling.json")["checkpoints"]
    text, seconds = pages.prose("scaling.md"), np.concatenate(list(found["seconds"].values()))
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
    seconds = pages.recorded("benchmark_input.json")["step"]["seconds"]
    step, lookup, shuffle = (1e3 * np.median(seconds[k]) for k in ("step", "lookup", "shuffle"))
    text = pages.prose("scaling.md")
    assert f"{step:.0f} ms in that run, looking a batch up {lookup:.2f} ms" in text
    assert f"shuffling an epoch {shuffle:.2f} ms a step" in text
    assert f"**{100 * (lookup + shuffle) / step:.3f}% of the step" in text
