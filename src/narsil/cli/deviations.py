"""What ``narsil compile`` and ``narsil verify`` say of a Deviation, beside its first line."""

from __future__ import annotations

from collections.abc import Iterator

from narsil.artifacts.compiled_info import Deviation

__all__ = ["deviation_lines"]


def deviation_lines(found: Deviation) -> Iterator[str]:
    """One line for each thing that was measured."""
    if found.log_odds is not None and found.bias is not None:
        yield f"log-odds: max deviation {found.log_odds:.2e}; mean score changed by {found.bias:+.1e} of it"
    if found.extreme_rows:
        yield (
            f"{found.extreme_rows:,} rows of long bags, repeated ids or large values: mean deviation "
            f"{found.extreme_mean_abs:.1e}, max {found.extreme_max_abs:.2e}"
        )
    if found.own_max_abs is not None:
        yield f"the artifact's own scores deviate from float64 by up to {found.own_max_abs:.2e}"
    if found.left_out:
        yield f"{found.left_out:,} rows left out: the artifact itself scores them as NaN or infinity"
    if found.auc is not None:
        yield f"AUC on {found.labelled_rows:,} labelled rows: {found.auc:.5f}, changed by {found.auc_change:+.1e}"
