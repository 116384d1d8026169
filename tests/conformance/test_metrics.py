"""/metrics tells what clients have done, whichever transport they use."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from narsil.dataflow import OneHot
from narsil.telemetry.exposition import Exposition
from narsil.telemetry.observer import CountingObserver
from tests.conformance.serving import ask, http_transport, predict_torchrec
from tests.conformance.test_oip_http import INFER, as_json
from tests.support import SCHEMA, TRANSPORTS, OneHotFeatures, engine_with, grpc_transport, one_hot, wait_until

NAMES = [feature.name for feature in SCHEMA.features]


def scraped(address: str) -> dict[tuple[str, ...], float]:
    """(name, values of labels but the model's) -> number."""
    page = ask(address, "/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(page.body.decode()):
        for sample in family.samples:
            labels = [each for label, each in sample.labels.items() if label not in ("model", "version")]
            found[sample.name, *labels] = sample.value
    return found


@pytest.mark.parametrize("kind", TRANSPORTS)
def test_what_clients_did_over_any_transport_is_told(kind):
    observer: Any = CountingObserver()
    features = one_hot(5)
    ids = features.sparse.ids.copy()
    ids[2] = 0  # all of one feature
    features = OneHotFeatures(5, features.dense, OneHot(ids))
    with (
        engine_with(None, observer=observer) as engine,
        grpc_transport(engine, kind=kind, observer=observer) as (_, where, _),
        http_transport(
            engine, observer, observer.model, Exposition(observer, engine.waiting, lambda *_: NAMES).page
        ) as (_, address),
        grpc.insecure_channel(where) as channel,
    ):
        for _ in range(40):
            predict_torchrec(channel, features)
        for _ in range(3):
            assert ask(address, INFER, as_json(features)).status == 200
        assert ask(address, INFER, b"{").status == 400
        wait_until(lambda: observer.model("fake", "1").batches == 43)
        found = scraped(address)
    assert found["narsil_requests_total", "answered", ""] == 43
    assert found["narsil_refused_requests_total", "/v2/models/infer", "InvalidRequest"] == 1
    assert found["narsil_request_seconds_count",] == found["narsil_request_split_seconds_count",] == 43
    assert found["narsil_batch_rows_sum",] == 43 * 5
    assert found["narsil_queue_requests",] == 0
    assert found["narsil_engine_answered_total",] == 43
    assert found["narsil_http_requests_total",] == 5
    sampled = found["narsil_feature_bags_total", "tags"]
    assert sampled >= 5
    assert found["narsil_feature_zero_ids_total", "tags"] == sampled
    zeros = np.count_nonzero(ids[0] == 0)
    assert found["narsil_feature_zero_ids_total", "user"] == sampled / 5 * zeros


def test_without_metrics_there_is_no_such_page():
    with engine_with(None) as engine, http_transport(engine) as (_, address):
        assert ask(address, "/metrics").status == 404
