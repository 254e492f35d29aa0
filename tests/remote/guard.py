"""Ends the server's processes when the test process closes its end of the pipe, or dies without having done so.

    python guard.py FOLDER < process ids, one a line

Each process id is the leader of a session. At the end of the input every process of these sessions is killed, and the
folder removed. A test process that is killed outright runs no `finally`; without this it would leave 30 processes.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

PATIENCE_S = 10


def kill_sessions(leaders: set[int]) -> None:
    """Kills every process of the sessions, and those that they start in the meantime.

    Without asking first: nothing of them is worth saving, and Ray would replace a worker that ends before its raylet.

    Raises:
        TimeoutError: some are still there after `PATIENCE_S`.
    """
    deadline = time.monotonic() + PATIENCE_S
    while alive := members(leaders):
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {alive} of the NDIF test server cannot be killed")
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def members(leaders: set[int]) -> list[int]:
    """By session and not by process group: Ray gives each worker a group of its own."""
    listed = subprocess.run(["ps", "-axo", "pid=,stat="], capture_output=True, text=True, check=True).stdout
    processes = (line.split() for line in listed.splitlines())
    return [int(pid) for pid, state in processes if not ended(state) and session(int(pid)) in leaders]


def ended(state: str) -> bool:
    """Whether a process only waits for its parent; one with an `l` still has threads, and with them its sockets."""
    return state.startswith("Z") and "l" not in state


def session(pid: int) -> int | None:
    """The session of a process, or None when it is gone."""
    try:
        return os.getsid(pid)
    except OSError:
        return None


def remove_dead_sockets() -> None:
    """NDIF's sandbox puts its sockets straight into /tmp, and a killed one leaves them there."""
    for path in glob.glob("/tmp/sbx-*.sock"):
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            if probe.connect_ex(path) == errno.ECONNREFUSED:
                os.unlink(path)


if __name__ == "__main__":
    try:
        kill_sessions({int(line) for line in sys.stdin})
    finally:
        remove_dead_sockets()
        shutil.rmtree(sys.argv[1], ignore_errors=True)
