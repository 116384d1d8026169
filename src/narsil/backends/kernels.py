"""Faster equal kernels for a TorchScript module's linear layers, chosen by measurement on this processor.

ATen sends FP32 linear layers to the BLAS it was built with. On processors for which that BLAS holds back its widest
vectors, oneDNN's kernels, which torch ships too, compute the same sums about twice as fast. Receives a scripted module
that has not run yet; rewrites linear + relu in its graph where that pays. Weights stay where they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch

log = logging.getLogger(__name__)

_LINEAR_RELU = """
graph(%x, %w, %b):
  %y = aten::linear(%x, %w, %b)
  %z = aten::relu(%y)
  return (%z)
"""

_ONEDNN = """
graph(%x, %w, %b):
  %attr : str = prim::Constant[value="relu"]()
  %none : NoneType = prim::Constant()
  %scalars : Scalar?[] = prim::ListConstruct()
  %z = mkldnn::_linear_pointwise(%x, %w, %b, %attr, %scalars, %none)
  return (%z)
"""

ROWS = 128  # a typical batch, for the measurement
GAIN = 1.1  # how much faster oneDNN must be to be taken
TOLERANCE = 1e-5  # relative to a layer's largest output; another order of the same FP32 sums


def tune_linear_layers(module: Any, threads: int) -> bool:
    """Rewrites the module's linear + relu pairs to oneDNN if they are equal and measure faster here.

    ``threads`` is the intra-op thread count of the lanes. Returns whether it did. Must be called before the module's
    first run: the executor keeps the graph it saw then.
    """
    layers = [(layer.weight, layer.bias) for layer in module.modules() if _is_linear(layer)]
    if not layers or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            gain = _gain(layers)
    finally:
        torch.set_num_threads(before)
    if gain < GAIN:
        log.info("linear layers stay with torch's own kernels (oneDNN would be x%.2f)", gain)
        return False
    graph = module.forward.graph
    torch._C._jit_pass_inline(graph)
    torch._C._jit_pass_custom_pattern_based_rewrite_graph(_LINEAR_RELU, _ONEDNN, graph)
    rewritten = str(graph).count("mkldnn::_linear_pointwise")
    log.info("%d of %d linear layers run on oneDNN's kernels (x%.2f)", rewritten, len(layers), gain)
    return rewritten > 0


def bucket(rows: int) -> int:
    """The number of rows that a batch is padded to: at most 1/16 more beyond 128 rows, and about a hundred
    different sizes up to 4096.

    oneDNN compiles a kernel for every number of rows it meets, which takes longer than a forward, and keeps about a
    thousand of them. Sizes that differ with every batch would have it compile for ever.
    """
    if rows <= 8:
        return rows
    step = 1 << max(3, (rows - 1).bit_length() - 5)
    return -(-rows // step) * step


def _is_linear(layer: Any) -> bool:
    return getattr(layer, "original_name", "") == "Linear" and layer.bias is not None


def _gain(layers: Sequence[tuple[Any, Any]]) -> float:
    """How many times faster oneDNN runs these layers; 0 where its results differ."""
    ours = theirs = 0.0
    for weight, bias in layers:
        rows = torch.rand(ROWS, weight.shape[1])

        def native(x: Any = rows, w: Any = weight, b: Any = bias) -> Any:
            return torch.relu(torch.nn.functional.linear(x, w, b))

        def onednn(x: Any = rows, w: Any = weight, b: Any = bias) -> Any:
            return torch.ops.mkldnn._linear_pointwise(x, w, b, "relu", [], None)

        expected = native()
        if float((onednn() - expected).abs().max()) > TOLERANCE * max(1.0, float(expected.abs().max())):
            return 0.0
        theirs += _best(native)
        ours += _best(onednn)
    return theirs / ours


def _best(run: Callable[[], Any]) -> float:
    """The shortest of several runs, seconds: what the kernel can do when nobody disturbs it."""
    times = []
    for _ in range(10):
        began = perf_counter()
        run()
        times.append(perf_counter() - began)
    return min(times)
