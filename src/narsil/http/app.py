"""What is answered where: the Open Inference Protocol's REST form with Triton's extensions, and probes.

Receives requests on the event loop's thread. Each is answered with JSON, errors too, or with JSON and binary data.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from functools import partial
from importlib.metadata import version
from typing import Any, TypeAlias

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from narsil.dataflow import Result
from narsil.engine.served_model import ServedModel
from narsil.errors import InvalidRequest, RequestError, http_status_of
from narsil.http import infer, openapi
from narsil.http.bodies import SMALL, Bodies, deflated, encoding_for
from narsil.http.jsontext import parse
from narsil.transports.codec import oip
from narsil.transports.codec.tensors import inputs_of, outputs_of
from narsil.transports.endpoints import Control, Decoded
from narsil.transports.scoring import Scoring

__all__ = ["MetricsPage", "Site"]

log = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]
MetricsPage: TypeAlias = Callable[[str], tuple[bytes, str]]  # Accept -> the page, and its content type
ModelHandler: TypeAlias = Callable[[Request, str, str], Awaitable[Response]]

METHOD = "/v2/models/infer"  # as whoever watches is told
_RETRIED = (429, 503)  # with which a client may come again
# A name may have slashes, so that the last words decide what is asked for.
_MODEL = re.compile(r"(?P<name>.+?)(?:/versions/(?P<version>[^/]+))?(?P<what>/infer|/ready|/config|/stats)?")


class Site:
    """Everything that is served over HTTP."""

    def __init__(
        self, control: Callable[[], Control], scoring: Scoring, bodies: Bodies, metrics: MetricsPage | None = None
    ) -> None:
        """``control`` gives what is in force now. Without ``metrics`` there is no such page."""
        self._control = control
        self._scoring = scoring
        self._bodies = bodies
        self._metrics = metrics
        self._of_models: dict[str, tuple[str, ModelHandler]] = {
            "/infer": ("POST", self._infer),
            "/ready": ("GET", self._model_ready),
            "/config": ("GET", self._config),
            "/stats": ("GET", self._stats),
            "": ("GET", self._metadata),
        }
        routes = [
            self._route("/livez", self._live),
            self._route("/readyz", self._ready),
            self._route("/metrics", self._metrics_page),
            self._route("/docs", self._docs),
            self._route("/openapi.json", self._openapi),
            self._route("/v2/health/live", self._live),
            self._route("/v2/health/ready", self._ready),
            self._route("/v2", self._server),
            self._route("/v2/repository/index", self._index, "POST"),
            self._route("/v2/repository/models/{name:path}/load", self._load, "POST"),
            self._route("/v2/repository/models/{name:path}/unload", self._unload, "POST"),
            self._route("/v2/models/stats", self._all_stats),
            self._route("/v2/models/{path:path}", self._model, "GET", "POST"),
        ]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: _refused_by_starlette})
        self.app.router.redirect_slashes = False

    def _route(self, path: str, handler: Handler, *methods: str) -> Route:
        async def guarded(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestError as error:
                return _error(http_status_of(error), str(error))
            except HTTPException:
                raise
            except (ClientDisconnect, asyncio.CancelledError):
                return _error(499, "the client has gone")  # nobody reads it
            except Exception:
                log.exception("an HTTP request failed")
                return _error(500, "internal error; the server's log says why")

        return Route(path, guarded, methods=list(methods or ("GET",)))

    async def _live(self, request: Request) -> Response:
        return _json({"live": True})

    async def _ready(self, request: Request) -> Response:
        ready = self._control().ready
        return _json({"ready": ready}, 200 if ready else 503)

    async def _metrics_page(self, request: Request) -> Response:
        if self._metrics is None:
            raise HTTPException(404)
        page = partial(self._metrics, request.headers.get("accept", ""))
        body, kind = await self._bodies.off_the_loop(SMALL + 1, page)
        return Response(body, 200, {"Content-Type": kind})

    async def _docs(self, request: Request) -> Response:
        return Response(openapi.page(), 200, media_type="text/html")

    async def _openapi(self, request: Request) -> Response:
        return _json(openapi.document())

    async def _server(self, request: Request) -> Response:
        return _json({"name": "narsil", "version": version("narsil"), "extensions": list(oip.EXTENSIONS)})

    async def _index(self, request: Request) -> Response:
        async with self._bodies.of(request) as body:
            asked = parse(body) if body.strip() else {}
        ready_only = isinstance(asked, dict) and asked.get("ready") is True
        known = self._control().index(ready_only=ready_only)
        keys = ("name", "version", "state", "reason")
        return _json([dict(zip(keys, each, strict=True)) for each in known])

    async def _load(self, request: Request) -> Response:
        return await self._changed(request, self._control().changeable().load)

    async def _unload(self, request: Request) -> Response:
        return await self._changed(request, self._control().changeable().unload)

    async def _changed(self, request: Request, change: Callable[[str], Future[bytes]]) -> Response:
        async with self._bodies.of(request) as body:
            asked = parse(body) if body.strip() else {}
        given = asked.get("parameters", {}) if isinstance(asked, dict) else None
        if not isinstance(given, dict):
            raise InvalidRequest("the body must be an object, and its parameters too; or leave it out")
        oip.check_load_parameters(given)
        await asyncio.wrap_future(change(request.path_params["name"]))
        return _json({})

    async def _all_stats(self, request: Request) -> Response:
        return await self._stats(request, "", "")

    async def _model(self, request: Request) -> Response:
        match = _MODEL.fullmatch(request.path_params["path"])
        if match is None:
            raise HTTPException(404)
        method, handler = self._of_models[match["what"] or ""]
        if request.method != method and (request.method, method) != ("HEAD", "GET"):
            raise HTTPException(405, headers={"Allow": method})
        return await handler(request, match["name"], match["version"] or "")

    async def _model_ready(self, request: Request, name: str, version_: str) -> Response:
        control = self._control()
        model = control.catalog.find(name, version_)
        return _json({"name": model.name, "ready": control.ready}, 200 if control.ready else 503)

    async def _metadata(self, request: Request, name: str, version_: str) -> Response:
        control = self._control()
        model = control.catalog.find(name, version_)
        described: dict[str, Any] = {"name": model.name, "versions": control.versions(model)}
        described["platform"] = f"narsil_{model.backend}"
        for key, tensors in (("inputs", inputs_of(model.schema)), ("outputs", outputs_of(model.schema))):
            described[key] = [{"name": each, "datatype": kind, "shape": list(shape)} for each, kind, shape in tensors]
        return _json(described)

    async def _config(self, request: Request, name: str, version_: str) -> Response:
        model = self._control().catalog.find(name, version_)
        described: dict[str, Any] = {"name": model.name, "platform": f"narsil_{model.backend}", "backend": "narsil"}
        described["max_batch_size"] = 0  # the first dimension is the model's own
        for key, tensors in (("input", inputs_of(model.schema)), ("output", outputs_of(model.schema))):
            described[key] = [
                {"name": each, "data_type": f"TYPE_{kind}", "dims": list(shape)} for each, kind, shape in tensors
            ]
        return _json(described)

    async def _stats(self, request: Request, name: str, version_: str) -> Response:
        counted = self._control().counted(name, version_)
        return _json(
            {
                "model_stats": [
                    {
                        "name": each,
                        "version": of,
                        "last_inference": int(counts.last * 1e3),
                        "inference_count": counts.rows,
                        "execution_count": counts.batches,
                        "inference_stats": {
                            stage: {"count": count, "ns": nanoseconds}
                            for stage, (count, nanoseconds) in oip.durations_of(counts).items()
                        },
                    }
                    for (each, of), counts in counted.items()
                ]
            }
        )

    async def _infer(self, request: Request, name: str, version_: str) -> Response:
        scoring, bodies = self._scoring, self._bodies
        async with bodies.of(request) as body:
            decode = self._decode(request, body, name, version_)
            decoded = await bodies.off_the_loop(len(body), lambda: scoring.decoded(METHOD, decode))
            gone = asyncio.ensure_future(_gone(request))
            try:
                result = await scoring.run(decoded, len(body), gone=gone)
            finally:
                gone.cancel()
            answer = lambda: scoring.encoded(METHOD, lambda: _answer(request, decoded, result))  # noqa: E731
            return await bodies.off_the_loop(_size_of(result), answer)

    def _decode(self, request: Request, body: bytes, name: str, version_: str) -> Callable[[], Decoded]:
        catalog, header_length = self._control().catalog, request.headers.get(infer.HEADER_LENGTH)

        def decode() -> Decoded:
            model: ServedModel = catalog.route(name, version_)
            asked = infer.read(body, header_length)
            features = asked.features(model.schema, model.limits)
            return Decoded(model, features, asked, timeout_s=asked.timeout_s, priority=asked.priority)

        return decode


async def _gone(request: Request) -> None:
    """Returns once the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _size_of(result: Result) -> int:
    """Bytes of an answer, about."""
    return 16 * sum(values.size for values in (result.scores or {}).values())


def _answer(request: Request, decoded: Decoded, result: Result) -> Response:
    asked: infer.InferRequest = decoded.echo
    body, header_length = infer.encode(decoded.model.name, decoded.model.version, asked, result.scores or {})
    headers: dict[str, str] = {}
    if header_length is not None:
        headers[infer.HEADER_LENGTH] = str(header_length)
    encoding = encoding_for(request.headers.get("accept-encoding", ""), len(body))
    if encoding is not None:
        body = deflated(body, encoding)
        headers["content-encoding"] = encoding
    kind = "application/json" if header_length is None else "application/octet-stream"
    return Response(body, 200, headers, kind)


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(value), status, headers, "application/json")


def _error(status: int, why: str, headers: Mapping[str, str] | None = None) -> Response:
    """The one form of an error. A body that was not read to its end ends the connection."""
    more = {"Retry-After": "1"} if status in _RETRIED else {}
    if status in (408, 413):
        more["Connection"] = "close"
    return _json({"error": why}, status, {**(headers or {}), **more})


async def _refused_by_starlette(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - it is registered for these alone
    known = {
        404: f"{request.url.path[:80]!r} is not served here; GET /v2 says what this is",
        405: f"{request.method[:20]} is not what {request.url.path[:80]!r} takes",
    }
    return _error(error.status_code, known.get(error.status_code, error.detail), error.headers)
