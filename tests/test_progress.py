"""The pace of a run, and the signals that stop it."""

import os
import signal

import pytest

from sire_jax.progress import Pace, stop_on_signals


def test_a_call_takes_about_a_second_and_at_most_what_is_asked_for():
    pace = Pace(100)
    assert pace.steps == 1
    # The first call compiles.
    pace.note(1, 30.0)
    assert pace.steps == 1
    pace.note(1, 0.125)
    assert pace.steps == 8
    pace.note(8, 0.08)
    assert pace.steps == 100
    pace.note(100, 50.0)
    assert pace.steps == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_system_may_ask_several_times(number):
    before = signal.getsignal(number)
    try:
        with stop_on_signals() as stop:
            assert stop.signal == ""
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert stop.signal == number.name
            assert not stop.by_person
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_second_ctrl_c_has_its_usual_effect():
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.signal, stop.by_person) == ("SIGINT", True)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_without_a_signal_all_is_as_before():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with stop_on_signals():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
