"""What TensorBoard shows is what metrics.jsonl has, whatever was killed in between."""

import numpy as np
import pytest

from sire_jax import configuration
from sire_jax.storage.logs import Logs, _records
from sire_jax.storage.workdir import Workdir, read_metrics

pytest.importorskip("tensorboardX")


@pytest.fixture
def directory(tmp_path):
    return Workdir(tmp_path, configuration.default())


def _record(directory, after, *steps):
    logs = Logs(directory, tensorboard=True)
    logs.go_on_after(after)
    for step in steps:
        logs.record(step, step // 10, "test", {"main/loss": np.array([step, step + 1.0])})
    logs.close()


def _events(directory):
    """Returns the scalars of all files of events, as they lie there."""
    from tensorboardX.proto.event_pb2 import Event

    paths = sorted((directory.path / "tensorboard").glob("*tfevents*"))
    events = [Event.FromString(event) for path in paths for _, event in _records(path)]
    return [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]


def _scalars(*steps):
    return [(step, "test/main/loss", step + 0.5) for step in steps]


def test_measurements_of_later_steps_are_dropped_from_both(directory):
    # It was killed after step 30; its newest checkpoint is of step 20.
    _record(directory, 0, 10, 20, 30)
    assert _events(directory) == _scalars(10, 20, 30)
    _record(directory, 20, 30, 40)
    assert _events(directory) == _scalars(10, 20, 30, 40)
    assert [line["step"] for line in read_metrics(directory.path)] == [10, 20, 30, 40]


def test_tensorboard_is_told_what_a_running_one_has_read_already(directory):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    _record(directory, 0, 10, 20)
    _record(directory, 10, 20)
    *_, newest = sorted((directory.path / "tensorboard").glob("*tfevents*"))
    events = [Event.FromString(event) for _, event in _records(newest)]
    starts = [e.step for e in events if e.session_log.status == SessionLog.START]
    assert starts == [11]


def test_an_event_that_a_kill_cut_off_is_written_again(directory):
    _record(directory, 0, 10, 20)
    (path,) = (directory.path / "tensorboard").glob("*tfevents*")
    path.write_bytes(path.read_bytes()[:-5])
    assert _events(directory) == _scalars(10)
    _record(directory, 20, 30)
    assert _events(directory) == _scalars(10, 20, 30)


def test_a_run_that_asks_for_tensorboard_later_has_all_of_it(directory):
    for step in (10, 20):
        directory.record(step, 1, "test", {"main/loss": np.array([step, step + 1.0])})
    _record(directory, 20, 30)
    assert _events(directory) == _scalars(10, 20, 30)


def test_nothing_is_written_for_tensorboard_unless_asked_for(directory):
    logs = Logs(directory, tensorboard=False)
    logs.go_on_after(0)
    logs.record(1, 1, "test", {"main/loss": np.ones(1)})
    logs.close()
    assert not (directory.path / "tensorboard").exists()
