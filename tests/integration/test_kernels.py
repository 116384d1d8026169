"""The torch backend's choice of kernels: equal scores, and few enough batch sizes."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("fbgemm_gpu")

from hypothesis import given, settings
from hypothesis import strategies as st

from narsil.backends import kernels
from narsil.backends.torchscript import TorchScriptBackend
from narsil.engine.collate import Collator
from tests.support import jagged, one_hot

TOLERANCE = 1e-5


@pytest.fixture
def rewritten(small_artifact, monkeypatch) -> TorchScriptBackend:
    """The backend with oneDNN's kernels, whatever this processor prefers."""
    monkeypatch.setattr(kernels, "GAIN", 0.0)
    return TorchScriptBackend.load(small_artifact, "cpu")


@pytest.fixture
def as_saved(small_artifact) -> TorchScriptBackend:
    return TorchScriptBackend.load(small_artifact, "cpu", tune=False)


@pytest.mark.parametrize("make", [one_hot, jagged])
@pytest.mark.parametrize("rows", [1, 7, 100, 1000])
def test_rewritten_layers_score_as_the_module_that_was_saved(rewritten, as_saved, make, rows):
    features = make(rows, rows, rewritten.schema)
    expected = as_saved.run(Collator(as_saved.schema).collate([features]))["default"]
    found = rewritten.run(Collator(rewritten.schema, rewritten.bucket).collate([features]))["default"][:rows]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_every_hidden_layer_is_rewritten_and_the_weights_stay_where_they_are(small_artifact, monkeypatch):
    monkeypatch.setattr(kernels, "GAIN", 0.0)
    from narsil.artifacts.torchscript import load_torchscript

    module = load_torchscript(small_artifact.torchscript, "cpu")
    before = {name: tensor.data_ptr() for name, tensor in module.named_parameters()}
    assert kernels.tune_linear_layers(module, 1)
    assert str(module.forward.graph).count("mkldnn::_linear_pointwise") == 4
    assert {name: tensor.data_ptr() for name, tensor in module.named_parameters()} == before


def test_kernels_that_are_not_faster_leave_the_module_alone(small_artifact, monkeypatch):
    monkeypatch.setattr(kernels, "GAIN", float("inf"))
    backend = TorchScriptBackend.load(small_artifact, "cpu")
    assert [backend.bucket(rows) for rows in (1, 9, 100)] == [1, 9, 100]


def test_kernels_whose_results_differ_are_never_taken(small_artifact, monkeypatch):
    monkeypatch.setattr(kernels, "GAIN", 0.0)
    monkeypatch.setattr(kernels, "TOLERANCE", -1.0)
    from narsil.artifacts.torchscript import load_torchscript

    layers = [
        (m.weight, m.bias)
        for m in load_torchscript(small_artifact.torchscript, "cpu").modules()
        if kernels._is_linear(m)
    ]
    assert kernels._gain(layers) == 0.0


@settings(deadline=None)
@given(st.integers(1, 1 << 20))
def test_a_bucket_holds_its_rows_and_wastes_little(rows):
    size = kernels.bucket(rows)
    assert rows <= size <= max(rows + 7, rows * 17 / 16)
    assert kernels.bucket(size) == size


def test_there_are_fewer_sizes_than_onednn_keeps_kernels_for():
    sizes = {kernels.bucket(rows) for rows in range(1, 4097)}
    assert len(sizes) * 6 < 1024  # a DLRM of six hidden layers


def test_padding_rows_change_nobody_s_scores(as_saved):
    parts = [one_hot(5, 1, as_saved.schema), jagged(8, 2, as_saved.schema)]
    padded = Collator(as_saved.schema, lambda rows: rows + 19).collate(parts)
    assert padded.rows == 32
    plain = Collator(as_saved.schema).collate(parts)
    np.testing.assert_allclose(
        as_saved.run(padded)["default"][:13], as_saved.run(plain)["default"], atol=TOLERANCE, rtol=0
    )
