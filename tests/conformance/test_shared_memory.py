"""Tensors in shared memory over both transports, with Triton's own client."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from narsil.backends.fake import FakeBehaviour
from narsil.transports.shared_memory import FOLDER
from tests.conformance.serving import serving
from tests.support import PATIENCE_S, TRANSPORTS, engine_with, grpc_transport, one_hot, scores_alone, wait_until

triton = pytest.importorskip("tritonclient.grpc", reason="no tritonclient")
shm = pytest.importorskip("tritonclient.utils.shared_memory", reason="no tritonclient")
pytestmark = pytest.mark.parametrize("kind", TRANSPORTS)


@contextmanager
def sharing(kind: str) -> Iterator[tuple[Any, str]]:
    """A client of a server that takes shared memory, and the model's name."""
    with (
        engine_with() as engine,
        grpc_transport(engine, None, kind, shared_memory=True) as (_, address, _),
        triton.InferenceServerClient(address) as client,
    ):
        yield client, engine.model.name


@contextmanager
def region(*arrays: np.ndarray) -> Iterator[tuple[Any, str]]:
    """A new object that begins with these arrays, 256 bytes longer, and its key."""
    key = f"/narsil-test-{secrets.token_hex(8)}"
    handle = shm.create_shared_memory_region(key, key, sum(array.nbytes for array in arrays) + 256)
    try:
        shm.set_shared_memory_region(handle, arrays)
        yield handle, key
    finally:
        shm.destroy_shared_memory_region(handle)


def inputs_in(name: str, *tensors: tuple[str, str, np.ndarray]) -> list[Any]:
    out, at = [], 0
    for tensor, datatype, values in tensors:
        out.append(triton.InferInput(tensor, list(values.shape), datatype))
        out[-1].set_shared_memory(name, values.nbytes, at)
        at += values.nbytes
    return out


def test_tensors_go_both_ways_through_shared_memory(kind):
    features = one_hot(6)
    dense, ids = np.ascontiguousarray(features.dense), np.ascontiguousarray(features.sparse.ids.T, "<i8")
    size = dense.nbytes + ids.nbytes
    with sharing(kind) as (client, model), region(dense, ids) as (handle, key):
        assert "system_shared_memory" in client.get_server_metadata().extensions
        client.register_system_shared_memory("in", key, size)
        client.register_system_shared_memory("out", key, 256, size)
        status = client.get_system_shared_memory_status().regions
        assert {name: (r.key, r.offset, r.byte_size) for name, r in status.items()} == {
            "in": (key, 0, size),
            "out": (key, size, 256),
        }
        wanted = triton.InferRequestedOutput("default")
        wanted.set_shared_memory("out", 24 + 8, offset=8)
        tensors = inputs_in("in", ("dense", "FP32", dense), ("ids", "INT64", ids))
        result = client.infer(model, tensors, outputs=[wanted])
        assert list(result.get_output("default").shape) == [6]
        found = shm.get_contents_as_numpy(handle, np.float32, [6], offset=size + 8)
        np.testing.assert_array_equal(found, scores_alone(features))
        np.testing.assert_array_equal(client.infer(model, tensors).as_numpy("default"), scores_alone(features))
        client.unregister_system_shared_memory("in")
        with pytest.raises(triton.InferenceServerException, match="'in' is not registered"):
            client.infer(model, tensors)
        client.unregister_system_shared_memory()
        assert not client.get_system_shared_memory_status().regions


def test_wrong_regions_are_refused_and_good_requests_beside_them_answered(kind):
    features = one_hot(3)
    dense, ids = np.ascontiguousarray(features.dense), np.ascontiguousarray(features.sparse.ids.T, "<i8")
    size = dense.nbytes + ids.nbytes
    with sharing(kind) as (client, model), region(dense, ids) as (handle, key):
        for wrong, why in (((key, size + 257), f"{size + 257} from 0 on"), (("/none-of-these", 8), "cannot be opened")):
            with pytest.raises(triton.InferenceServerException, match=why) as caught:
                client.register_system_shared_memory("in", *wrong)
            assert "INVALID_ARGUMENT" in caught.value.status()
        client.register_system_shared_memory("in", key, size)
        good = inputs_in("in", ("dense", "FP32", dense), ("ids", "INT64", ids))
        beyond = inputs_in("in", ("ids", "INT64", ids), ("dense", "FP32", dense))
        beyond[1].set_shared_memory("in", dense.nbytes, size - dense.nbytes + 1)
        with pytest.raises(triton.InferenceServerException, match=f"'in' has {size} bytes"):
            client.infer(model, beyond)
        outside = ids.copy()
        outside[2, 1] = -1
        shm.set_shared_memory_region(handle, [dense, outside])
        with pytest.raises(triton.InferenceServerException, match="row 2: id -1 is outside its table"):
            client.infer(model, good)
        shm.set_shared_memory_region(handle, [dense, ids])
        np.testing.assert_array_equal(client.infer(model, good).as_numpy("default"), scores_alone(features))


def test_memory_that_shrinks_while_its_request_runs_is_an_error_of_that_request(kind):
    hold = threading.Event()
    features = one_hot(2)
    dense, ids = np.ascontiguousarray(features.dense), np.ascontiguousarray(features.sparse.ids.T, "<i8")
    with (
        engine_with(FakeBehaviour(hold=hold)) as engine,
        grpc_transport(engine, None, kind, shared_memory=True) as (_, address, _),
        triton.InferenceServerClient(address) as client,
        region(dense, ids) as (_, key),
        ThreadPoolExecutor(1) as calls,
    ):
        client.register_system_shared_memory("in", key, dense.nbytes + ids.nbytes)
        client.register_system_shared_memory("out", key, 256, dense.nbytes + ids.nbytes)
        wanted = triton.InferRequestedOutput("default")
        wanted.set_shared_memory("out", 8)
        tensors = inputs_in("in", ("dense", "FP32", dense), ("ids", "INT64", ids))
        running = calls.submit(client.infer, engine.model.name, tensors, outputs=[wanted])
        wait_until(lambda: engine.statistics().running == 1)
        os.truncate(f"{FOLDER}{key}", 8)
        hold.set()
        with pytest.raises(triton.InferenceServerException, match="'out' is smaller than when it was registered"):
            running.result(PATIENCE_S)


def test_it_is_off_unless_asked_for(kind):
    with serving(kind) as (address, engine), triton.InferenceServerClient(address) as client:
        assert "system_shared_memory" not in client.get_server_metadata().extensions
        for ask in (
            client.get_system_shared_memory_status,
            client.unregister_system_shared_memory,
            lambda: client.register_system_shared_memory("in", "/in", 8),
        ):
            with pytest.raises(triton.InferenceServerException) as caught:
                ask()
            assert "UNIMPLEMENTED" in caught.value.status()
        dense = triton.InferInput("dense", [1, 3], "FP32")
        dense.set_shared_memory("in", 12)
        with pytest.raises(triton.InferenceServerException, match=r"not served here \(--shared-memory\)"):
            client.infer(engine.model.name, [dense])
