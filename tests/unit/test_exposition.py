"""The metrics page says what has happened, in Prometheus' forms, and docs/operations.md lists all of it."""

from __future__ import annotations

import re

import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse

from narsil.dataflow import Result, StageTimes
from narsil.engine.engine import EngineStatistics
from narsil.errors import Cancelled, DeadlineExceeded, Draining, ForwardFailed, InvalidRequest, QueueFull, RequestError
from narsil.http.connection import ConnectionCounts
from narsil.telemetry.exposition import Exposition
from narsil.telemetry.observer import CountingObserver
from tests.documents import codes, read, rows_of, sections
from tests.support import SCHEMA, fake_model, request

MODEL = {"model": "fake", "version": "1"}
QUEUES = {("fake", "1"): {"requests": 2, "rows": 30, "ids": 120, "bytes": 4096}}
OPEN = "application/openmetrics-text; version=1.0.0"


def busy() -> CountingObserver:
    """One that has been told of everything."""
    observer, model = CountingObserver(), fake_model()
    observer.serving([model])
    times = StageTimes(queue=0.25, collate=0.001, execute=0.5, split=0.001)
    scores = {"default": np.array([0.25, 0.75], np.float32)}
    observer.ended([(request(2, model=model), Result(scores, times=times))] * 3)
    for error in (QueueFull, Draining, InvalidRequest, DeadlineExceeded, Cancelled, ForwardFailed):
        observer.ended([(request(model=model), Result(error=error("why")))])
    observer.ran(model, 3, 6, 0.75)
    observer.refused("/a.B/C", InvalidRequest("why"))
    observer.undelivered("/a.B/C", ValueError("why"))
    observer.passed_over(model, ["embedding_features"])
    observer.watch("plane", lambda: {"connections": 7, "open_connections": 3})
    return observer


def page(observer: CountingObserver, accept: str = "") -> str:
    names = [feature.name for feature in SCHEMA.features]
    text, kind = Exposition(observer, lambda: QUEUES, lambda name, version: names).page(accept)
    assert kind.startswith("application/openmetrics-text" if accept else "text/plain")
    return text.decode()


def samples(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in parse(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def value(found: dict[str, list[tuple[dict[str, str], float]]], name: str, **labels: str) -> float:
    (one,) = (number for these, number in found[name] if labels.items() <= these.items())
    return one


def test_every_end_has_its_outcome_and_its_reason():
    found = samples(page(busy()))
    ends = {(labels["outcome"], labels["reason"]): count for labels, count in found["narsil_requests_total"]}
    assert ends == {
        ("answered", ""): 3,
        ("rejected", "QueueFull"): 1,
        ("rejected", "Draining"): 1,
        ("rejected", "InvalidRequest"): 1,
        ("expired", "DeadlineExceeded"): 1,
        ("cancelled", "Cancelled"): 1,
        ("failed", "ForwardFailed"): 1,
    }


def test_seconds_are_those_of_answered_requests_in_cumulative_buckets():
    found = samples(page(busy()))
    assert value(found, "narsil_request_seconds_count", **MODEL) == 3
    assert value(found, "narsil_request_seconds_sum", **MODEL) == pytest.approx(2.256)
    assert value(found, "narsil_request_execute_seconds_bucket", le="0.2", **MODEL) == 0
    assert value(found, "narsil_request_execute_seconds_bucket", le="0.5", **MODEL) == 3
    assert value(found, "narsil_request_execute_seconds_bucket", le="+Inf", **MODEL) == 3


def test_batches_queues_scores_features_and_what_others_count_are_there():
    found = samples(page(busy()))
    assert value(found, "narsil_batch_requests_sum", **MODEL) == 3
    assert value(found, "narsil_batch_rows_bucket", le="8.0", **MODEL) == 1
    assert value(found, "narsil_lane_busy_seconds_total", lane="MainThread", **MODEL) == 0.75
    assert value(found, "narsil_queue_bytes", **MODEL) == 4096
    assert value(found, "narsil_scores_sampled_total", task="default", **MODEL) == 2
    assert value(found, "narsil_score_running_sum", task="default", **MODEL) == 1.0
    assert value(found, "narsil_score_bucket", le="0.3", **MODEL) == 1
    assert value(found, "narsil_feature_bags_total", feature="shop", **MODEL) == 2
    assert value(found, "narsil_refused_requests_total", method="/a.B/C", reason="InvalidRequest") == 1
    assert value(found, "narsil_undelivered_answers_total", method="/a.B/C") == 1
    assert value(found, "narsil_passed_over_requests_total", group="embedding_features", **MODEL) == 1
    assert value(found, "narsil_plane_connections_total") == 7
    assert value(found, "narsil_plane_open_connections") == 3
    assert value(found, "narsil_model_served", **MODEL) == 1
    assert value(found, "process_resident_memory_bytes") > 0


def test_features_of_a_model_that_has_gone_are_left_out():
    text, _ = Exposition(busy(), lambda: {}, lambda name, version: []).page("")
    assert not [labels for labels, _ in samples(text.decode()).get("narsil_feature_ids_total", [])]


def test_an_openmetrics_parser_takes_it_too():
    families = {family.name: family for family in parse_open(page(busy(), OPEN))}
    assert families["narsil_request_seconds"].type == "histogram"
    assert families["narsil_build"].type == "info"


def families(observer: CountingObserver) -> dict[str, str]:
    """Name -> type, of all that is Narsil's."""
    lines = re.findall(r"^# TYPE (narsil_\S+) (\w+)$", page(observer), re.MULTILINE)
    return {name: kind for name, kind in lines if not re.match("narsil_(plane|http|engine)_", name)}


def test_the_table_of_metrics_lists_all_of_them_with_their_types_and_labels():
    observer = busy()
    rows = rows_of(sections(read("docs/operations.md"), 2)["Metrics"])
    told = {codes(row[0])[0]: (row[1], codes(row[2])) for row in rows if codes(row[0])[0].startswith("narsil_")}
    known = families(observer)
    assert {name: kind for name, (kind, _) in told.items()} == known
    labels: dict[str, set[str]] = {}
    for name, found in samples(page(observer)).items():
        family = name if name in known else re.sub("_(bucket|sum|count)$", "", name)
        labels.setdefault(family, set()).update(label for these, _ in found for label in these if label != "le")
    assert {name: set(these) for name, (_, these) in told.items()} == {name: labels[name] for name in known}


def test_what_engine_plane_and_http_count_is_told_by_the_names_of_their_counts():
    text = sections(read("docs/operations.md"), 2)["Metrics"]
    for name in (*EngineStatistics.__slots__, *ConnectionCounts.__slots__):
        assert f"`{name}`" in text


def test_every_error_of_a_request_has_an_outcome():
    """What is not listed counts as failed, which it must be."""
    from narsil.telemetry.exposition import _OUTCOMES

    kinds = {kind.__name__ for kind in RequestError.__subclasses__()} - {"Unavailable"}
    before_the_engine = {"ModelNotFound", "MessageTooLarge", "Refused"}
    assert kinds - before_the_engine - set(_OUTCOMES) == {"ForwardFailed"}
