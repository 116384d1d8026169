"""The OpenAPI document of what is served over HTTP, and a page that shows it."""

from __future__ import annotations

import html
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

__all__ = ["document", "page"]

_NAME = {"name": "name", "in": "path", "required": True, "description": "A model's name.", "schema": {"type": "string"}}
_VERSION = {**_NAME, "name": "version", "description": "One of its versions; without, the one added last."}
_NUMBERS = {"type": "array", "description": "Flat, or nested as shape says.", "items": {}}
_PARAMETERS = {"type": "object", "additionalProperties": {"type": ["boolean", "integer", "number", "string"]}}
_SHAPE = {"type": "array", "items": {"type": "integer"}}
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_TENSOR: dict[str, Any] = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"type": "string"},
        "datatype": {"enum": ["FP16", "BF16", "FP32", "FP64", "INT32", "INT64"]},
        "shape": _SHAPE,
        "data": _NUMBERS,
        "parameters": _PARAMETERS,
    },
}
_OUTPUT = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "parameters": _PARAMETERS},
}
_INFER_REQUEST = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "inputs": {"type": "array", "items": _TENSOR},
        "outputs": {"type": "array", "items": _OUTPUT},
        "parameters": _PARAMETERS,
    },
}
_INFER_RESPONSE = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {
        "id": {"type": "string"},
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "outputs": {"type": "array", "items": _TENSOR},
    },
}
_INDEX = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name", "version", "state"],
        "properties": {each: {"type": "string"} for each in ("name", "version", "state")},
    },
}


def _object(**properties: str) -> dict[str, Any]:
    """An object with all of these, each of a type."""
    return {
        "type": "object",
        "required": [*properties],
        "properties": {name: {"type": kind} for name, kind in properties.items()},
    }


_LIVE, _READY = _object(live="boolean"), _object(ready="boolean")
_STATS = _object(model_stats="array")
# Path -> (method, summary, answer, statuses of errors). Of the paths below a model's, {model} is the model's own.
_PATHS: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "/livez": ("get", "Whether the process answers", _LIVE, ()),
    "/readyz": ("get", "Whether requests are taken", _READY, (503,)),
    "/v2/health/live": ("get", "Whether the process answers", _LIVE, ()),
    "/v2/health/ready": ("get", "Whether requests are taken", _READY, (503,)),
    "/v2": ("get", "What this server is", _object(name="string", version="string", extensions="array"), ()),
    "/v2/repository/index": ("post", "What is served", _INDEX, (400, 408, 413, 415, 429)),
    "/v2/repository/models/{name}/load": (
        "post",
        "Serves what the repository holds of a model now",
        {"type": "object"},
        (400, 404, 408, 413, 415, 429),
    ),
    "/v2/repository/models/{name}/unload": (
        "post",
        "Serves no version of a model any more",
        {"type": "object"},
        (400, 404, 408, 413, 415, 429),
    ),
    "/v2/models/stats": ("get", "Counts and times of all models", _STATS, (503,)),
    "{model}": (
        "get",
        "A model's inputs and outputs",
        _object(name="string", versions="array", platform="string", inputs="array", outputs="array"),
        (404, 503),
    ),
    "{model}/ready": ("get", "Whether a model is ready", _object(name="string", ready="boolean"), (404, 503)),
    "{model}/config": (
        "get",
        "A model's configuration, as Triton has it",
        _object(name="string", platform="string", backend="string", max_batch_size="integer"),
        (404, 503),
    ),
    "{model}/stats": ("get", "A model's counts and times", _STATS, (404, 503)),
    "{model}/infer": (
        "post",
        "Scores; tensors may also follow the JSON as binary data",
        _INFER_RESPONSE,
        (400, 404, 408, 413, 415, 429, 500, 503, 504),
    ),
}
_BODIES = {
    "{model}/infer": _INFER_REQUEST,
    "/v2/repository/index": {"type": "object"},
    "/v2/repository/models/{name}/load": {"type": "object", "properties": {"parameters": {"type": "object"}}},
    "/v2/repository/models/{name}/unload": {"type": "object", "properties": {"parameters": {"type": "object"}}},
}


def document() -> dict[str, Any]:
    """The document, as JSON has it."""
    paths: dict[str, Any] = {}
    for path, (method, summary, answer, errors) in _PATHS.items():
        for full, parameters in _expanded(path):
            operation: dict[str, Any] = {"summary": summary, "responses": _responses(answer, errors)}
            if parameters:
                operation["parameters"] = parameters
            if path in _BODIES:
                operation["requestBody"] = {
                    "required": path.endswith("infer"),
                    "content": {"application/json": {"schema": _BODIES[path]}},
                }
            paths[full] = {method: operation}
    for path, kind in (("/metrics", "text/plain"), ("/docs", "text/html"), ("/openapi.json", "application/json")):
        paths[path] = {"get": {"responses": {"200": {"description": "The page", "content": {kind: {}}}}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Narsil", "version": version("narsil"), "description": "The Open Inference Protocol."},
        "paths": paths,
    }


def _expanded(path: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The path with its parameters; of a model's, with a version and without."""
    if not path.startswith("{model}"):
        yield path, [_NAME] if "{name}" in path else []
        return
    rest = path.removeprefix("{model}")
    yield f"/v2/models/{{name}}{rest}", [_NAME]
    yield f"/v2/models/{{name}}/versions/{{version}}{rest}", [_NAME, _VERSION]


def _responses(answer: dict[str, Any], errors: tuple[int, ...]) -> dict[str, Any]:
    def of(description: str, schema: dict[str, Any]) -> dict[str, Any]:
        return {"description": description, "content": {"application/json": {"schema": schema}}}

    found = {200: of("The answer", answer), **{status: of("What is wrong", _ERROR) for status in errors}}
    if 503 in errors and "ready" in answer.get("properties", {}):
        found[503] = of("Not ready, or what is wrong", {"anyOf": [answer, _ERROR]})
    return {str(status): each for status, each in found.items()}


def page() -> str:
    """The document for people: a page without scripts and without outside resources."""
    rows = "".join(
        f"<tr><td><code>{method.upper()} {html.escape(path)}</code></td>"
        f"<td>{html.escape(operation.get('summary', ''))}</td><td>{', '.join(operation['responses'])}</td></tr>"
        for path, methods in document()["paths"].items()
        for method, operation in methods.items()
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        "<title>Narsil over HTTP</title><style>:root{color-scheme:light dark}body{font:1rem system-ui;margin:2rem}"
        "td{padding:.3rem 1rem .3rem 0;vertical-align:top}</style><h1>Narsil over HTTP</h1>"
        '<p>The Open Inference Protocol. <a href="/openapi.json">openapi.json</a> has every field.</p>'
        f"<table><tr><th>Path<th>What<th>Statuses{rows}</table></html>"
    )
