"""The plane where the system refuses it something: a process of each test's own, whose kernel says no to one call."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from narsil.extension import AVAILABLE
from tests.support import PATIENCE_S

if not AVAILABLE:
    pytest.skip("built without the native extension", allow_module_level=True)

ROOT = Path(__file__).parents[2]
BEGIN = """
    import errno, os, sys, time
    from narsil._native import Plane
    from tests.seccomp import refuse
    plane = Plane({"/a.A/Ask": "unary"})
"""


def run(script: str, *arguments: str) -> None:
    """Runs the script in a process of its own."""
    command = [sys.executable, "-c", dedent(BEGIN) + dedent(script), *arguments]
    ended = subprocess.run(command, cwd=ROOT, timeout=PATIENCE_S, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_what_cannot_be_watched_is_not_listened_on_and_leaves_nothing_open(tmp_path):
    run(
        """
        def descriptors():
            return sorted(os.listdir("/proc/self/fd"))

        before = descriptors()
        refuse("epoll_ctl", errno.ENOSPC)
        for listen in (lambda: plane.listen_tcp("localhost", 0), lambda: plane.listen_unix(sys.argv[1])):
            try:
                listen()
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
            else:
                raise AssertionError("it listens")
            assert descriptors() == before
        assert not os.path.exists(sys.argv[1])
        plane.stop(0)
        """,
        str(tmp_path / "socket"),
    )


@pytest.mark.parametrize("error", ["EPERM", "ENOSYS", "EINVAL"])
def test_where_the_fine_wait_is_refused_the_coarse_one_waits(error):
    run(
        """
        refuse("epoll_pwait2", getattr(errno, sys.argv[1]))
        began, used = time.monotonic(), time.process_time()
        assert plane.poll(1.0) == ([], [])
        assert time.monotonic() - began >= 1.0
        used = time.process_time() - used
        assert used < 0.2, f"it waited with {used} s of a processor"
        plane.stop(0)
        """,
        error,
    )
