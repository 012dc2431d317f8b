"""Signals end a block where nothing is lost, and are only noted where work can go on later."""

import os
import signal
import threading

import pytest

from ssl_kit.core.process import Signals

HEEDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", HEEDED)
def test_the_first_one_ends_the_block_with_the_conventional_code(number):
    former = signal.getsignal(number)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended, Signals():
        send(number)
    assert ended.type is KeyboardInterrupt if number == signal.SIGINT else ended.value.code == 128 + number
    assert signal.getsignal(number) is former


@pytest.mark.parametrize("number", HEEDED)
def test_patient_it_is_noted_and_the_first_one_stays(number):
    with Signals() as signals:
        signals.patient = True
        assert signals.received is None
        send(number)
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        assert signals.received == number


def test_a_second_ctrl_c_means_now():
    with pytest.raises(KeyboardInterrupt), Signals() as signals:
        signals.patient = True
        send(signal.SIGTERM)
        send(signal.SIGINT)


def test_tidying_up_is_not_disturbed_by_the_same_signal_again():
    tidied = []
    with pytest.raises(SystemExit), Signals():
        try:
            send(signal.SIGTERM)
        finally:
            send(signal.SIGTERM)
            tidied.append(True)
    assert tidied


def test_they_can_be_taken_again_from_somebody_else():
    with Signals() as signals:
        signals.patient = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signals.take()
        send(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    signals.take()  # outside it takes nothing
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_outside_the_main_thread_it_does_nothing():
    former, found = signal.getsignal(signal.SIGTERM), []

    def block():
        with Signals() as signals:
            signals.take()
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=block)
    thread.start()
    thread.join()
    assert found == [former]


def test_under_nohup_a_closed_terminal_is_no_request():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            send(signal.SIGHUP)
            signals.take()
            send(signal.SIGHUP)
            assert signals.received is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(SystemExit):
                send(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, former)
