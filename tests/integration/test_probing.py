"""What a model takes is found by running it; nothing is read outside of a table however the model is made."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("fbgemm_gpu")
    import torch.nn.functional as F
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode

from narsil.artifacts.probing import Probed, Takes, probe
from narsil.artifacts.tbe import table_at
from narsil.errors import ArtifactError
from narsil.program.bounds import id_limit
from narsil.program.steps import Bags
from tests.integration.test_program_steps import operator

pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH = 13
ROW = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))


class Columns(torch.nn.Module):  # type: ignore[name-defined]
    """Columns alone. ``does`` is what it computes of them."""

    def __init__(self, does: Callable[[Any], Any], weights: Any = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(WIDTH + 3, 4) if weights is None else weights)
        self.does = does

    def forward(self, batch: Any) -> Any:
        return self.does(batch["x"])


def probed(model: Any, dense_dim: int | None = None) -> Probed:
    return probe(model, Takes("x", {}), dense_dim, lambda weights, position: pytest.fail("no table"), "m.pt")


FOUND: dict[str, Callable[[Any], Any]] = {
    "a linear layer": lambda x: F.linear(x, ROW[None]),
    "concatenated first": lambda x: F.linear(torch.cat([x, x[:, :2]], 1), torch.ones(1, WIDTH + 2)),
    "batch norm first": lambda x: F.batch_norm(x, ROW, ROW.abs() + 1),
    "layer norm first": lambda x: F.layer_norm(x, (WIDTH,)),
    "standardised": lambda x: (x - ROW) / (ROW.abs() + 1),
    "log1p first": lambda x: F.linear(torch.log1p(x.clamp(min=0)), ROW[None]),
    "nan_to_num first": lambda x: torch.nan_to_num(x) @ ROW,
}


@pytest.mark.parametrize("name", FOUND)
def test_the_number_of_columns_is_found(name: str) -> None:
    assert probed(Columns(FOUND[name])).dense_dim == WIDTH


def test_a_model_that_takes_columns_by_their_places_has_as_many_as_it_needs(caplog: pytest.LogCaptureFixture) -> None:
    assert probed(Columns(lambda x: x[:, [0, 1, 2]])).dense_dim == 3
    assert "runs with 3, 4 and other numbers of columns in x; it is taken to have 3: --dense-dim" in caplog.text
    assert probed(Columns(lambda x: x[:, [0, 1, 2]]), 5).dense_dim == 5


def test_a_model_that_takes_any_number_of_columns_says_so() -> None:
    with pytest.raises(ArtifactError, match=r"runs with 1, 2 and other numbers of columns in x, .*--dense-dim"):
        probed(Columns(lambda x: x.sum(1)))
    assert probed(Columns(lambda x: x.sum(1)), 5).dense_dim == 5


def test_weights_that_torch_keeps_packed_are_the_same_each_time() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(WIDTH, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    layers = torch.ao.quantization.quantize_dynamic(layers, {torch.nn.Linear}, dtype=torch.qint8)
    found = probed(Columns(torch.jit.script(layers)), WIDTH)
    assert found.readings.program is None
    assert "quantized.linear_dynamic" in found.readings.problem


def test_a_number_of_columns_that_was_given_must_run() -> None:
    with pytest.raises(ArtifactError, match="does not run on rows of 4 columns"):
        probed(Columns(FOUND["a linear layer"]), 4)


@pytest.mark.parametrize(
    "error", [ValueError("no such luck"), RuntimeError("no such luck"), AssertionError("no such luck")]
)
def test_a_model_that_raises_is_told_with_what_it_raises(error: Exception) -> None:
    def raises(x: Any) -> Any:
        raise error

    with pytest.raises(ArtifactError, match=r"runs with no number of dense columns.*no such luck"):
        probed(Columns(raises, torch.zeros(3, 3)))


@pytest.mark.parametrize(
    "does", [lambda x: (x @ ROW).sum(0), lambda x: (x @ ROW)[:-1], lambda x: F.linear(x, ROW[None]).t()]
)
def test_outputs_that_are_not_laid_out_by_rows_are_refused(does: Callable[[Any], Any]) -> None:
    with pytest.raises(ArtifactError, match="it must have one entry for each row"):
        probed(Columns(does))


def test_outputs_as_wide_as_there_are_rows_are_refused() -> None:
    with pytest.raises(ArtifactError, match="follows from how many rows there are"):
        probed(Columns(lambda x: (x * ROW) @ x.t()))


class LooksUp(torch.nn.Module):  # type: ignore[name-defined]
    """One feature in a table of 10 rows. ``change`` is what becomes of its ids."""

    def __init__(self, change: Callable[[Any], Any], kind: Any = None) -> None:
        super().__init__()
        self.table = operator([SparseType.INT8], [10], [8], PoolingMode.SUM, [0])
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.change, self.kind = change, kind
        self.looked_up = 0

    def forward(self, batch: Any) -> Any:
        ids, lengths = batch["g.values"], batch["g.lengths"]
        if self.kind is not None and ids.dtype != self.kind:
            raise TypeError(f"ids are {ids.dtype}")
        ids = self.change(ids)
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
        made = self.table(ids.int(), offsets.int())
        self.looked_up += 1
        return made.sum(1)


def looked_up(model: LooksUp) -> Probed:
    return probe(
        model, Takes(None, {"g": (1, False)}), None, lambda weights, at: table_at(model.table, at, "m.pt"), "m.pt"
    )


def limit_of(found: Probed) -> int:
    (lookup,) = found.readings.lookups
    return id_limit(lookup.ids, lookup.tables[0].rows, 2**63 - 1 if found.wide_ids else 2**31)


def test_a_lookup_is_read_and_scores_as_it_did() -> None:
    model = LooksUp(lambda ids: ids + 2)
    found = looked_up(model)
    assert limit_of(found) == 8
    lengths, ids = np.array([[3, 0, 2]]), np.array([0, 7, 7, 1, 5], np.int32)
    expected = model({"g.lengths": torch.from_numpy(lengths[0]).int(), "g.values": torch.from_numpy(ids)})
    assert found.readings.program is not None
    given = found.readings.program.reference({}, {"g": Bags(lengths, ids)})["default"]
    np.testing.assert_allclose(given, expected.double().numpy(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("change", [lambda ids: ids - 1, lambda ids: ids + 10, lambda ids: ids * 0 + 10_000_000])
def test_id_0_that_leads_outside_of_its_table_is_refused_before_it_is_read(change: Callable[[Any], Any]) -> None:
    model = LooksUp(change)
    with pytest.raises(ArtifactError, match=r"the id 0 becomes .* of 10 rows: the model would read out of bounds"):
        looked_up(model)
    assert model.looked_up == 0


def test_a_model_of_int64_ids_is_found() -> None:
    found = looked_up(LooksUp(lambda ids: ids % 10, torch.int64))
    assert found.wide_ids
    assert limit_of(found) == 2**63 - 1
    assert not looked_up(LooksUp(lambda ids: ids, torch.int32)).wide_ids
