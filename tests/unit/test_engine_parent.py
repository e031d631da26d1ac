"""An engine core that loses its parent."""

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection

from server.engine.parent import end_with_parent

TIMEOUT_S = 30


def core() -> None:
    end_with_parent()
    time.sleep(TIMEOUT_S)


def api_process(connection: Connection) -> None:
    child = multiprocessing.get_context("spawn").Process(target=core)
    child.start()
    connection.send(child.pid)
    time.sleep(TIMEOUT_S)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_it_ends_when_its_parent_is_killed() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    parent = context.Process(target=api_process, args=(theirs,))
    parent.start()
    theirs.close()
    assert ours.poll(TIMEOUT_S)
    child = ours.recv()
    # Long enough for the child to have come as far as its watch.
    time.sleep(2)
    assert is_running(child)
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.join(TIMEOUT_S)
    deadline = time.monotonic() + TIMEOUT_S / 3
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ours.close()
    parent.close()


def test_a_process_of_its_own_is_left_alone() -> None:
    end_with_parent()
    assert multiprocessing.parent_process() is None
