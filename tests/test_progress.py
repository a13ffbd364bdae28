"""The pace of a run, and the signals that stop it."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from sire_jax.job.progress import Pace, stop_on_signals


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


NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _handlers():
    """As in a terminal, whatever started the tests; and all as before at the end."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_system_may_ask_several_times(number):
    with stop_on_signals() as stop:
        assert stop.signal == ""
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.signal == number.name
        assert not stop.by_person


def test_a_second_ctrl_c_has_its_usual_effect():
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.signal, stop.by_person) == ("SIGINT", True)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("sent", [(), NUMBERS])
def test_all_is_as_before_afterwards(sent):
    before = [signal.getsignal(number) for number in NUMBERS]
    for _ in range(2):
        with stop_on_signals():
            assert all(signal.getsignal(n) != b for n, b in zip(NUMBERS, before, strict=True))
            for number in sent:
                os.kill(os.getpid(), number)
        assert [signal.getsignal(number) for number in NUMBERS] == before


def test_ctrl_c_that_was_ignored_stays_ignored_and_the_system_is_heard():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == "SIGTERM"
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_in_a_thread_that_is_not_the_main_one_there_is_nothing_to_note():
    before = [signal.getsignal(number) for number in NUMBERS]

    def enter():
        with stop_on_signals() as stop:
            return stop.signal, [signal.getsignal(number) for number in NUMBERS]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() == ("", before)
