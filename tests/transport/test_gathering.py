"""When an event loop is idle, by its selector: a real loop, whose work and files the test controls."""

import asyncio
import socket

import pytest

from sluice_server.transport.gathering import IdleSelector


class Idleness:
    """What a loop is to do when it is idle, and how often it was."""

    def __init__(self) -> None:
        self.times = 0
        self.work = []

    def __call__(self) -> bool:
        self.times += 1
        if not self.work:
            return False
        asyncio.get_running_loop().call_soon(self.work.pop())
        return True


@pytest.fixture
def idleness():
    return Idleness()


@pytest.fixture
def selector(idleness):
    with IdleSelector(idleness) as selector:
        yield selector


def run(selector, coroutine):
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        return runner.run(coroutine)


def test_a_loop_with_work_is_never_idle(selector, idleness):
    async def work() -> None:
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def turn(left: int) -> None:
            loop.call_soon(*((turn, left - 1) if left else (done.set,)))

        turn(1000)
        await done.wait()

    run(selector, work())
    assert idleness.times == 0


def test_a_loop_that_would_wait_is_asked_for_work_first_and_does_it_at_once(selector, idleness):
    async def wait() -> None:
        done = asyncio.Event()
        idleness.work.append(done.set)
        await done.wait()  # for ever, if the loop waited without another turn

    run(selector, wait())
    assert idleness.times == 1


def test_a_loop_waits_when_there_is_nothing_to_do(selector, idleness):
    async def wait() -> None:
        done = asyncio.Event()
        asyncio.get_running_loop().call_later(0.02, done.set)
        await done.wait()

    run(selector, wait())
    assert idleness.times >= 1


def test_files_that_are_ready_come_before_idleness(selector, idleness):
    idleness.work.append(lambda: None)
    near, far = socket.socketpair()
    with near, far:
        selector.register(near, 1, "near")
        far.send(b"!")
        assert [key.data for key, _ in selector.select(None)] == ["near"]
    assert idleness.times == 0


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_look_that_does_not_wait_is_no_sign_of_idleness(selector, idleness, timeout):
    assert selector.select(timeout) == []
    assert idleness.times == 0
