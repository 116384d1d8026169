"""The OpenAPI document says what the server does: held against it by schemathesis, and against its routes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from narsil.catalog.control import Standing
from narsil.errors import ModelNotFound
from narsil.http.openapi import document
from narsil.telemetry.exposition import Exposition
from narsil.telemetry.observer import CountingObserver
from tests.conformance.serving import ask, http_transport
from tests.conformance.test_oip_http import as_json
from tests.documents import codes, read, rows_of, sections
from tests.support import engine_with, one_hot

schemathesis = pytest.importorskip("schemathesis", reason="no schemathesis")


def of_models_that_are_here() -> dict[str, Any]:
    """The document, of which a model's name is mostly one that is served."""
    told = deepcopy(document())
    known = {"name": ["fake", "other"], "version": ["1", "9"]}
    for methods in told["paths"].values():
        for operation in methods.values():
            for given in operation.get("parameters", ()):
                given["schema"] = {"enum": known[given["name"]]}
    return told


SCHEMA = schemathesis.openapi.from_dict(of_models_that_are_here())


class OneModel:
    """Loads and unloads ``fake``, of which nothing is seen."""

    def load(self, name: str) -> Future[bytes]:
        done: Future[bytes] = Future()
        if name == "fake":
            done.set_result(b"")
        else:
            done.set_exception(ModelNotFound(f"the repository has no model {name!r}"))
        return done

    unload = load

    def index(self) -> list[tuple[str, str, Standing]]:
        return [("fake", "1", Standing("READY"))]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    observer = CountingObserver()
    with engine_with(None, observer=observer) as engine:
        page = Exposition(observer, engine.waiting, lambda name, version: []).page
        with http_transport(engine, observer, observer.model, page, OneModel()) as (_, where):
            yield where


def checks() -> list[Any]:
    from schemathesis import checks as known

    return [
        known.not_a_server_error,
        known.CHECKS.get_one("status_code_conformance"),
        known.CHECKS.get_one("content_type_conformance"),
        known.CHECKS.get_one("response_schema_conformance"),
    ]


@SCHEMA.parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_asked_is_answered_as_the_document_says(case, address):
    case.call_and_validate(base_url=f"http://{address}", checks=checks())


def paths() -> list[tuple[str, str, dict[str, Any]]]:
    """(path with a model's name, method, its answers)."""
    return [
        (path.format(name="fake", version="1"), method, operation["responses"])
        for path, methods in document()["paths"].items()
        for method, operation in methods.items()
    ]


@pytest.mark.parametrize(("path", "method", "responses"), paths())
def test_every_path_of_the_document_is_there_by_its_method_alone(address, path, method, responses):
    body = None if method == "get" else as_json(one_hot(1)) if path.endswith("infer") else b"{}"
    answer = ask(address, path, body)
    assert answer.status == 200
    assert answer.headers["content-type"].partition(";")[0] in responses["200"]["content"]
    other = ask(address, path, None if body else b"{}")
    assert other.status == 405
    assert method.upper() in other.headers["allow"].split(", ")


def test_the_document_and_the_protocol_s_page_list_the_same_paths():
    rows = rows_of(sections(read("docs/protocol.md"), 2)["Open Inference Protocol over HTTP"])
    told: set[str] = set()
    for row in rows:
        names = codes(row[0])
        models = [name for name in told if name.endswith(("NAME", "VERSION"))]
        added = [name for name in names if re.match("/(v2/models/NAME)?/?(infer|ready|config|stats)$", name)]
        told |= {model + name for model in models for name in added} if added else set(names)
    listed = {path.format(name="NAME", version="VERSION") for path in document()["paths"]}
    assert told == listed


def test_the_page_for_people_needs_nothing_from_outside(address):
    page = ask(address, "/docs").body.decode()
    assert "POST /v2/models/{name}/infer" in page
    assert "http" not in re.sub("over HTTP", "", page).replace("</html>", "").replace("<!doctype html>", "")
    assert "<script" not in page
