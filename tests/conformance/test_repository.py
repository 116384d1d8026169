"""Models that clients load and unload, and versions that share a name's requests, over both transports."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

import narsil
from narsil.bench.workload import narsil_body, predictor_body
from narsil.catalog.control import ModelControl
from narsil.catalog.manager import ModelManager
from narsil.client import Client, ModelStatus, read_response
from narsil.dataflow import Features
from narsil.engine.served_model import ServedModel
from narsil.errors import ModelNotFound, Refused
from tests.conformance.test_oip import call, infer_request
from tests.messages import inference_pb2 as pb
from tests.support import PATIENCE_S, TRANSPORTS, engine_with, fake_model, grpc_transport, one_hot, scores_alone
from tests.unit.test_repository import put

pytestmark = pytest.mark.parametrize("kind", TRANSPORTS)


def loading(folder, held) -> tuple[ServedModel, list[Features]]:
    if held.version == "9":
        raise Refused("9 is damaged")
    return fake_model(name=folder.name, version=held.version), []


@contextmanager
def serving(kind: str, root: Path, *, explicit: bool = True) -> Iterator[str]:
    """The address of a server of this repository."""
    with engine_with() as engine:
        manager = ModelManager(engine)
        control = ModelControl(root, manager, loading, explicit=explicit)
        control.load_all()
        with grpc_transport(engine, kind=kind, models=control) as (transport, address, _):
            manager.subscribe(transport.serve)
            try:
                yield address
            finally:
                control.stop()


def test_narsils_client_lists_loads_and_unloads(kind, tmp_path):
    put(tmp_path, "ads", "1")
    rows = one_hot(3)
    dense, ids = rows.dense, rows.sparse.ids.T
    with serving(kind, tmp_path) as address, Client(address) as client:
        assert client.models(PATIENCE_S) == [ModelStatus("ads", "1", "READY")]
        put(tmp_path, "ads", "2")
        put(tmp_path, "feed", "1")
        client.load("ads", PATIENCE_S)
        client.load("feed", PATIENCE_S)
        assert client.models(PATIENCE_S) == [ModelStatus("ads", "2", "READY"), ModelStatus("feed", "1", "READY")]
        found = client.predict(dense, ids, model="feed", timeout=PATIENCE_S)
        assert (found.model_name, found.model_version) == ("feed", "1")
        np.testing.assert_array_equal(found.scores["default"], scores_alone(rows))
        put(tmp_path, "ads", "9")
        with pytest.raises(Refused, match="failed to load 'ads': 9 is damaged"):
            client.load("ads", PATIENCE_S)
        assert client.predict(dense, ids, model="ads", timeout=PATIENCE_S).model_version == "2"
        client.unload("feed", PATIENCE_S)
        with pytest.raises(ModelNotFound, match="'feed' is not served here"):
            client.predict(dense, ids, model="feed", timeout=PATIENCE_S)
        with pytest.raises(ModelNotFound, match="the repository has no model 'none'"):
            client.load("none", PATIENCE_S)
        assert [(each.name, each.version, each.state, each.reason) for each in client.models(PATIENCE_S)] == [
            ("ads", "2", "READY", ""),
            ("ads", "9", "UNAVAILABLE", "9 is damaged"),
            ("feed", "", "UNAVAILABLE", "unloaded"),
        ]


def test_the_client_for_asyncio_does_too(kind, tmp_path):
    put(tmp_path, "ads", "1")

    async def converse(address: str) -> list[list[ModelStatus]]:
        async with narsil.AsyncClient(address) as client:
            await client.unload("ads", PATIENCE_S)
            before = await client.models(PATIENCE_S)
            await client.load("ads", PATIENCE_S)
            return [before, await client.models(PATIENCE_S)]

    with serving(kind, tmp_path) as address:
        before, after = asyncio.run(converse(address))
    assert before == [ModelStatus("ads", "", "UNAVAILABLE", "unloaded")]
    assert after == [ModelStatus("ads", "1", "READY")]


def test_tritons_client_loads_and_unloads(kind, tmp_path):
    triton = pytest.importorskip("tritonclient.grpc", reason="no tritonclient")
    put(tmp_path, "ads", "1")
    with serving(kind, tmp_path) as address:
        client = triton.InferenceServerClient(address)
        client.unload_model("ads")
        assert not client.is_model_ready("ads")
        client.load_model("ads")
        assert client.is_model_ready("ads")
        index = client.get_model_repository_index()
        assert [(each.name, each.version, each.state) for each in index.models] == [("ads", "1", "READY")]
        with pytest.raises(triton.InferenceServerException, match="the parameter 'config' is not taken"):
            client.load_model("ads", config="{}")
        client.close()


def test_only_what_is_served_is_listed_where_that_is_asked_for(kind, tmp_path):
    put(tmp_path, "ads", "1")
    put(tmp_path, "feed", "9")
    with serving(kind, tmp_path) as address, grpc.insecure_channel(address) as channel:
        for ready, states in ((False, ["READY", "UNAVAILABLE"]), (True, ["READY"])):
            index = call(channel, "RepositoryIndex", pb.RepositoryIndexRequest(ready=ready), pb.RepositoryIndexResponse)
            assert [each.state for each in index.models] == states


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (pb.RepositoryModelLoadRequest(), "model_name is missing"),
        (pb.RepositoryModelLoadRequest(model_name="ads", repository_name="other"), "none called 'other'"),
        (pb.RepositoryModelLoadRequest(model_name="../../etc"), "the repository has no model '../../etc'"),
    ],
)
def test_what_cannot_be_loaded_is_told(kind, tmp_path, request_, error):
    put(tmp_path, "ads", "1")
    with serving(kind, tmp_path) as address, grpc.insecure_channel(address) as channel:
        for method, response in (
            ("RepositoryModelLoad", pb.RepositoryModelLoadResponse),
            ("RepositoryModelUnload", pb.RepositoryModelUnloadResponse),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(channel, method, request_, response)
            assert error in caught.value.details()


def test_nothing_is_loaded_where_that_was_not_allowed(kind, tmp_path):
    put(tmp_path, "ads", "1")
    with serving(kind, tmp_path, explicit=False) as address, Client(address) as client:
        with pytest.raises(Refused, match="start the server with --repository and --model-control explicit"):
            client.load("ads", PATIENCE_S)
        with pytest.raises(Refused, match="--model-control explicit"):
            client.unload("ads", PATIENCE_S)
    with (
        engine_with() as engine,
        grpc_transport(engine, kind=kind) as (_, address, _),
        Client(address) as client,
        pytest.raises(Refused, match="this server serves the one model"),
    ):
        client.load("fake", PATIENCE_S)


def test_shares_and_labels_hold_on_every_wire(kind, tmp_path):
    put(
        tmp_path,
        "ads",
        "1",
        "2",
        "3",
        config='versions = "all"\n[labels]\ncanary = "2"\n[split]\n"1" = 3\ncanary = 1\n',
    )
    rows = one_hot(2)
    with serving(kind, tmp_path) as address, grpc.insecure_channel(address) as channel:
        predict = channel.unary_unary("/narsil.v1.Inference/Predict")
        body = narsil_body(rows)
        seen = Counter(read_response(predict(body, timeout=PATIENCE_S)).model_version for _ in range(40))
        assert seen.keys() == {"1", "2"}
        assert 8 <= seen["2"] <= 12
        labelled = predict(body, metadata=(("narsil-model-version", "canary"),), timeout=PATIENCE_S)
        assert read_response(labelled).model_version == "2"
        seen = Counter(
            call(channel, "ModelInfer", infer_request(rows, model_name="ads"), pb.ModelInferResponse).model_version
            for _ in range(40)
        )
        assert 8 <= seen["2"] <= 12
        third = infer_request(rows, model_name="ads", model_version="3")
        assert call(channel, "ModelInfer", third, pb.ModelInferResponse).model_version == "3"
        score = channel.unary_unary("/predictor.Predictor/Predict")
        for version in ("canary", "3", ""):
            assert score(predictor_body(rows), metadata=(("narsil-model-version", version),), timeout=PATIENCE_S)
        with pytest.raises(grpc.RpcError) as caught:
            score(predictor_body(rows), metadata=(("narsil-model-version", "stable"),), timeout=PATIENCE_S)
        assert "'1', '2', '3', 'canary' are" in caught.value.details()


def test_a_refusal_of_one_who_asks_for_too_much_is_an_argument_error(kind, tmp_path):
    put(tmp_path, "ads", "1")
    with serving(kind, tmp_path) as address, grpc.insecure_channel(address) as channel:
        request = pb.RepositoryModelLoadRequest(model_name="ads")
        request.parameters["file:1/model.pt"].bytes_param = b"a model from the network"
        with pytest.raises(grpc.RpcError) as caught:
            call(channel, "RepositoryModelLoad", request, pb.RepositoryModelLoadResponse)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "'file:1/model.pt' is not taken" in caught.value.details()
