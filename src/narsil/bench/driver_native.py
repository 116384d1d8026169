"""The load's driver in C++ (`narsil._load`): one thread on nghttp2, a fraction of grpcio's cost a request."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from narsil import _load
from narsil.bench.load import Load, LoadError, OnProgress, Part
from narsil.bench.workload import method


class NativeDriver:
    """See load.Driver. Raises LoadError where no server answers.

    Of each reply it counts the first task's scores; those of all tasks are compared in the replies that are kept.
    """

    def __init__(self, load: Load) -> None:
        self._keep = load.keep
        try:
            self._client = _load.Client(
                load.target,
                method(load.protocol),
                load.workload.serialized(load.protocol),
                wire=load.protocol,
                task=load.workload.schema.tasks[0],
                rows=load.workload.rows * load.workload.schema.widths[0],
                connections=load.connections,
                timeout_s=load.timeout_s,
            )
            self._client.connect()
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise LoadError(str(error)) from None

    def closed_loop(self, requests: int, concurrency: int, on_progress: OnProgress) -> Part:
        """See load.Driver."""
        return _part(self._client.closed_loop(requests, concurrency, keep=self._keep, on_progress=on_progress))

    def open_loop(self, due: NDArray[np.float64], on_progress: OnProgress) -> Part:
        """See load.Driver."""
        return _part(self._client.open_loop(due, keep=self._keep, on_progress=on_progress))

    def close(self) -> None:
        """See load.Driver."""
        self._client.close()


def _part(result: _load.Result) -> Part:
    return Part(result.latencies, result.errors, result.replies, result.late_s)
