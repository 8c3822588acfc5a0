"""Signals that ask the process to end: none is missed, whenever it comes, and nothing stays behind."""

from __future__ import annotations

import signal
import threading

import pytest

from sluice_server.termination import Termination
from support.fakes import PATIENCE_S, eventually

BOTH = (signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_that_comes_before_the_wait_ends_it(number):
    termination = Termination()
    with termination.listening():
        assert not termination.asked
        signal.raise_signal(number)
        assert termination.asked
        termination.wait()


def test_a_signal_that_comes_during_the_wait_ends_it():
    termination = Termination()
    main = threading.main_thread().ident
    assert main is not None
    with termination.listening():
        sender = threading.Timer(0.02, signal.pthread_kill, (main, signal.SIGTERM))
        sender.start()
        termination.wait()
        sender.join()
    assert termination.asked


def test_a_signal_that_another_thread_is_given_ends_the_wait():
    """The main thread is not interrupted by it; what wakes it is the socket alone."""
    termination = Termination()
    with termination.listening():
        released = threading.Event()
        other = threading.Thread(target=released.wait, args=(PATIENCE_S,))
        other.start()
        assert other.ident is not None
        signal.pthread_kill(other.ident, signal.SIGTERM)
        termination.wait()
        released.set()
        other.join()
    assert termination.asked


def test_another_signal_does_not_end_the_wait():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    termination = Termination()
    main = threading.main_thread().ident
    assert main is not None

    def send() -> None:
        signal.pthread_kill(main, signal.SIGUSR1)
        eventually(lambda: bool(heard), "the other signal is heard")
        signal.pthread_kill(main, signal.SIGTERM)

    try:
        with termination.listening():
            sender = threading.Thread(target=send)
            sender.start()
            termination.wait()
            sender.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (heard, termination.asked) == ([1], True)


def test_what_was_in_place_before_is_restored():
    before = [signal.getsignal(number) for number in BOTH]
    with Termination().listening():
        assert [signal.getsignal(number) for number in BOTH] != before
    assert [signal.getsignal(number) for number in BOTH] == before
    assert signal.set_wakeup_fd(-1) == -1
