"""A lane's jobs: each is done once, or not at all, and whoever waits for it hears which."""

from __future__ import annotations

from concurrent.futures import CancelledError

import pytest

from narsil.engine.lane import Job


def test_a_job_is_done_once_it_has_run():
    done: list[int] = []
    job = Job(lambda: done.append(1))
    assert not job.done.done()
    job.run()
    assert (done, job.done.result(0)) == ([1], None)


def test_a_job_that_was_cancelled_is_passed_over():
    done: list[int] = []
    job = Job(lambda: done.append(1))
    job.done.cancel()
    job.run()
    assert done == []
    with pytest.raises(CancelledError):
        job.done.result(0)


@pytest.mark.parametrize("error", [RuntimeError("no memory"), SystemExit(3)])
def test_what_a_job_raises_reaches_whoever_waits_for_it_and_not_the_lane(error):
    def fail() -> None:
        raise error

    job = Job(fail)
    job.run()
    assert job.done.exception(0) is error
