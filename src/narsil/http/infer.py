"""The Open Inference Protocol's inference request and response over HTTP: JSON, and tensors as binary data behind it.

With the header ``Inference-Header-Content-Length`` a body is so many bytes of JSON and then the raw numbers of those
tensors whose parameter ``binary_data_size`` says how many bytes they take, in order; so are answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from narsil.artifacts.schema import ModelSchema
from narsil.dataflow import Features, RequestLimits, Scores
from narsil.errors import InvalidRequest
from narsil.http.jsontext import Numbers, as_list, parse
from narsil.transports import validate
from narsil.transports.codec import oip
from narsil.transports.codec.tensors import Tensor, check_names, dtype_of, features_of, picked, tensor_of

__all__ = ["HEADER_LENGTH", "InferRequest", "encode", "read"]

HEADER_LENGTH = "inference-header-content-length"

_SHOWN = 80  # characters of a name that a client gave
_ROWS_A_PIECE = 4096  # of an answer in JSON, between which other threads run
# Datatypes whose numbers JSON holds, and how they are read.
_IN_JSON: dict[str, type[np.int64 | np.float64]] = {
    "FP32": np.float64,
    "FP64": np.float64,
    "INT32": np.int64,
    "INT64": np.int64,
}


@dataclass(slots=True)
class _Input:
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Numbers | tuple[int, int]  # in JSON, or where its bytes are


@dataclass(slots=True)
class InferRequest:
    """A request taken apart as far as that needs no model."""

    body: bytes
    request_id: str = ""
    timeout_s: float | None = None
    priority: int = 0
    inputs: list[_Input] = field(default_factory=list)
    outputs: dict[str, bool] = field(default_factory=dict)  # that are asked for -> whether as binary data
    binary: bool = False  # whether others are answered so

    def features(self, schema: ModelSchema, limits: RequestLimits) -> Features:
        """The rows, held against the schema: views of the body where they are binary. Raises InvalidRequest."""
        check_names(tuple(self.outputs), schema)
        return features_of([self._tensor(each) for each in self.inputs], schema, limits)

    def _tensor(self, each: _Input) -> Tensor:
        name, dtype = each.name[:_SHOWN], dtype_of(each.name, each.datatype)
        if isinstance(each.data, tuple):
            return tensor_of(each.name, each.datatype, each.shape, validate.array(self.body, *each.data, dtype, name))
        kind = _IN_JSON.get(each.datatype)
        if kind is None:
            raise InvalidRequest(f"{name}: {each.datatype} has no form in JSON; send it as binary data")
        values = each.data.array(kind, name, each.shape)
        if dtype == np.int32 and len(values):
            outside = (values < -(1 << 31)) | (values >= 1 << 31)
            if outside.any():
                raise InvalidRequest(f"{name}: {values[np.argmax(outside)]} is no INT32; send INT64")
        with np.errstate(over="ignore"):  # what FP32 does not hold becomes infinite, and is refused as such
            return tensor_of(each.name, each.datatype, each.shape, values.astype(dtype, copy=False))


def read(body: bytes, header_length: str | None) -> InferRequest:
    """A request, not yet held against any schema. Raises InvalidRequest where it is none, or asks for what is not
    served."""
    size = len(body) if header_length is None else _header_length(header_length, len(body))
    message = _of(parse(body[:size] if size < len(body) else body, "the request"), dict, "the request")
    parameters = _parameters(message, "the request")
    timeout, priority = parameters.get("timeout"), parameters.get("priority", 0)
    out = InferRequest(
        body,
        _of(message.get("id", ""), str, "id"),
        oip.timeout_of(timeout),
        priority if isinstance(priority, int) else 0,
        binary=_flag(parameters, "binary_data_output", "the request"),
    )
    at = size
    for given in _list(message, "inputs"):
        found, at = _read_input(given, at)
        out.inputs.append(found)
    if at != len(body):
        raise InvalidRequest(
            f"the body has {len(body) - size} bytes behind its JSON, and the inputs' binary_data_size add up to "
            f"{at - size}"
        )
    for given in _list(message, "outputs"):
        name, binary = _read_output(given, out.binary)
        if name in out.outputs:
            raise InvalidRequest("an output is asked for twice; name each once, or none for all")
        out.outputs[name] = binary
    return out


def encode(model_name: str, version: str, request: InferRequest, scores: Scores) -> tuple[bytes, int | None]:
    """The answer's body, and the length of its JSON where binary data follows it."""
    outputs, raw = [], []
    for task, values in picked(scores, tuple(request.outputs)).items():
        described = {"name": task, "datatype": "FP32", "shape": list(values.shape)}
        if request.outputs.get(task, request.binary):
            raw.append(values.astype("<f4", copy=False).tobytes())
            outputs.append(json.dumps({**described, "parameters": {"binary_data_size": len(raw[-1])}}))
        else:
            outputs.append(f'{json.dumps(described)[:-1]}, "data": [{", ".join(_numbers(values.reshape(-1)))}]}}')
    known = {
        "model_name": model_name,
        "model_version": version,
        **({"id": request.request_id} if request.request_id else {}),
    }
    header = f'{json.dumps(known)[:-1]}, "outputs": [{", ".join(outputs)}]}}'.encode()
    return b"".join([header, *raw]), len(header) if raw else None


def _numbers(values: Any) -> Iterator[str]:
    for start in range(0, len(values), _ROWS_A_PIECE):
        yield json.dumps(values[start : start + _ROWS_A_PIECE].tolist())[1:-1]


def _header_length(text: str, most: int) -> int:
    size = int(text) if text.isascii() and text.isdigit() and len(text) <= 12 else -1
    if not 0 < size <= most:
        raise InvalidRequest(
            f"Inference-Header-Content-Length is {text[:20]!r}; it must be 1 to the body's {most} bytes"
        )
    return size


def _read_input(given: Any, at: int) -> tuple[_Input, int]:
    """An input, and where the next one's binary data begins."""
    message = _of(given, dict, "an input")
    name = _of(message.get("name"), str, "an input's name")
    where = f"input {name[:_SHOWN]!r}"
    parameters = _parameters(message, where)
    datatype = _of(message.get("datatype"), str, f"{where}: datatype")
    shape = _of(message.get("shape"), Numbers, f"{where}: shape").sizes(f"{where}: shape")
    size = parameters.get("binary_data_size")
    if (size is None) == ("data" not in message):
        raise InvalidRequest(f"{where} must have either data or the parameter binary_data_size")
    if size is None:
        data = message["data"]
        if not isinstance(data, Numbers):
            dtype_of(name, datatype)  # strings and truth values are of datatypes that no input has
            raise InvalidRequest(f"{where}: its data is no array of numbers")
        return _Input(name, datatype, shape, data), at
    if not isinstance(size, int) or size is True or not 0 <= size < 1 << 48:
        raise InvalidRequest(f"{where}: binary_data_size is no number of bytes")
    return _Input(name, datatype, shape, (at, at + size)), at + size


def _read_output(given: Any, binary: bool) -> tuple[str, bool]:
    """An output's name, and whether it is wanted as binary data."""
    message = _of(given, dict, "an output")
    name = _of(message.get("name"), str, "an output's name")
    where = f"output {name[:_SHOWN]!r}"
    parameters = _parameters(message, where)
    return name, _flag(parameters, "binary_data", where) if "binary_data" in parameters else binary


def _parameters(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = _of(message.get("parameters", {}), dict, f"{where}: parameters")
    oip.refuse(found, where)
    return found


def _flag(parameters: Mapping[str, Any], name: str, where: str) -> bool:
    value = parameters.get(name, False)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{where}: {name} must be true or false")
    return value


def _list(message: Mapping[str, Any], name: str) -> list[Any]:
    found: list[Any] = _of(as_list(message.get(name, [])), list, name)
    return found


_NAMES = {dict: "an object", list: "an array of objects", str: "a string", Numbers: "an array of numbers"}


def _of(value: Any, kind: type[Any], what: str) -> Any:
    if not isinstance(value, kind):
        raise InvalidRequest(f"{what} is missing, or is not {_NAMES[kind]}")
    return value
