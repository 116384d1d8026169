"""What one core can do: how fast it multiplies large matrices in each kind of number. Layers are held against it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from statistics import median
from time import perf_counter, process_time
from typing import Any

__all__ = ["SIZE", "MatrixProducts", "matrix_product_peaks"]

SIZE = 1024  # of both matrices
REPEATS = 3  # of which the fastest counts: others may have used the core meanwhile
ROUNDS = 5  # at least

Product = Callable[[], Any]
Clock = Callable[[], float]  # seconds


class MatrixProducts:
    """A large product in fp32, bf16 and int8, by each of torch's kernels for it that runs here. Needs torch."""

    def __init__(self) -> None:
        import torch

        left, right = torch.rand(SIZE, SIZE), torch.rand(SIZE, SIZE)
        bias = torch.zeros(SIZE)
        low_left, low_right = left.bfloat16(), right.bfloat16()
        bytes_left, bytes_right = (torch.randint(-127, 127, (SIZE, SIZE), dtype=torch.int8) for _ in range(2))

        def onednn() -> Any:
            with torch.inference_mode():
                return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], None)

        self._kernels: list[tuple[str, Product]] = [
            ("fp32", lambda: left @ right),
            ("fp32", onednn),
            ("bf16", lambda: low_left @ low_right),
            ("int8", lambda: torch._int_mm(bytes_left, bytes_right)),
        ]
        self._kernels = [(kind, run) for kind, run in self._kernels if _runs(run)]

    def measure(self, clock: Clock = perf_counter) -> dict[str, float]:
        """GFLOP/s by kind of number, by the fastest kernel. A kind that this torch has no kernel for is missing."""
        speeds: dict[str, float] = {}
        for kind, run in self._kernels:
            fastest = min(_seconds(run, clock) for _ in range(REPEATS))
            speeds[kind] = max(speeds.get(kind, 0.0), 2 * SIZE**3 / fastest / 1e9)
        return speeds


def matrix_product_peaks(seconds: float = 2.0) -> dict[str, float]:
    """GFLOP/s of one core by kind of number, the median of as many rounds as these seconds hold; empty without torch.

    By the process's CPU clock, so that what others take of the core meanwhile does not count.
    """
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        products = MatrixProducts()
        found: list[dict[str, float]] = []
        end = perf_counter() + seconds
        while len(found) < ROUNDS or perf_counter() < end:
            found.append(products.measure(process_time))
    finally:
        torch.set_num_threads(threads)
    return {kind: round(median(one[kind] for one in found), 1) for kind in found[0]}


def _runs(run: Product) -> bool:
    """Whether there is such a kernel. Also the warm-up: kernels are prepared in their first run."""
    try:
        run()
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


def _seconds(run: Product, clock: Clock) -> float:
    began = clock()
    run()
    return clock() - began
