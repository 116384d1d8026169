"""The Open Inference Protocol over gRPC: the messages of proto/inference.proto.

Both ways of sending tensors are read, raw and typed; answers are raw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts.schema import ModelSchema
from narsil.dataflow import Features, RequestLimits, Scores
from narsil.errors import InvalidRequest
from narsil.telemetry.observer import ModelCounts
from narsil.transports import validate
from narsil.transports.codec.tensors import (
    Sizes,
    Tensor,
    check_names,
    dtype_of,
    features_of,
    inputs_of,
    outputs_of,
    picked,
    tensor_of,
)
from narsil.transports.shared_memory import Region, SharedMemory, Slot
from narsil.wire import (
    FIXED64,
    LEN,
    MAX_FIELDS,
    VARINT,
    Field,
    expect,
    malformed,
    put_len,
    put_text,
    put_uint,
    put_varint,
    scan,
    text,
)

SERVICE = "/inference.GRPCInferenceService/"
EXTENSIONS = ("model_configuration", "statistics", "binary_tensor_data", "model_repository")
SHARED_MEMORY = "system_shared_memory"  # an extension that is off unless it is asked for

_STATELESS = "Narsil keeps no state between requests; leave it out"
_REGION, _REGION_OFFSET, _REGION_SIZE = "shared_memory_region", "shared_memory_offset", "shared_memory_byte_size"
_NO_SHARED_MEMORY = "shared memory is not served here (--shared-memory); send the tensor's bytes"
# Parameters that would change what an answer means, and cannot be had.
_REFUSED = {
    "sequence_id": _STATELESS,
    "sequence_start": _STATELESS,
    "sequence_end": _STATELESS,
    "classification": "classes are not ranked here; leave it out and take the scores",
    _REGION: _NO_SHARED_MEMORY,
}
_TYPED = {"FP32": (6, "fp32_contents"), "FP64": (7, "fp64_contents"), "INT32": (2, "int_contents")} | {
    "INT64": (3, "int64_contents")
}
# Of DataType in Triton's ModelConfig.
_TRITON_TYPES = {"INT32": 8, "INT64": 9, "FP32": 11}

Parameter = bool | int | float | str


@dataclass(slots=True)
class _Input:
    name: str = ""
    datatype: str = ""
    shape: list[int] = field(default_factory=list)
    contents: tuple[int, int] | None = None
    place: _Place | None = None  # where its bytes are, if not in the message


@dataclass(frozen=True, slots=True)
class _Place:
    """Bytes of a region of shared memory, as a request's parameters say."""

    region: str
    offset: int
    size: int


class _Budget:
    """Bounds the fields of a message and of all that it holds: reading them costs far more than their bytes do."""

    def __init__(self) -> None:
        self._left = MAX_FIELDS

    def scan(self, body: bytes, start: int, stop: int) -> list[Field]:
        found = scan(body, start, stop)
        self._left -= len(found)
        if self._left < 0:
            raise malformed(start, f"more than {MAX_FIELDS} fields")
        return found


@dataclass(slots=True)
class InferRequest:
    """A serialized ModelInferRequest taken apart as far as that needs no model."""

    body: bytes
    model_name: str = ""
    model_version: str = ""
    request_id: str = ""
    timeout_s: float | None = None
    priority: int = 0
    inputs: list[_Input] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    places: dict[str, _Place] = field(default_factory=dict)  # of outputs that are not to stand in the answer
    raw: list[tuple[int, int]] = field(default_factory=list)
    budget: _Budget = field(default_factory=_Budget)

    def features(self, schema: ModelSchema, limits: RequestLimits, memory: SharedMemory | None = None) -> Features:
        """The rows, held against the schema: views of the body where they are raw. Raises InvalidRequest.

        ``memory`` is what ``read`` was told is served.
        """
        check_names(self.outputs, schema)
        return features_of(self._tensors(limits, memory), schema, limits)

    def slots(self, schema: ModelSchema, rows: int, memory: SharedMemory | None) -> dict[str, Slot]:
        """Where outputs go that are not to stand in the answer. Raises InvalidRequest where they have no room."""
        out: dict[str, Slot] = {}
        for name, place in self.places.items():
            needed = 4 * rows * schema.outputs[name]
            if place.size < needed:
                raise InvalidRequest(f"output {name[:80]!r} has {needed} bytes; {_REGION_SIZE} is {place.size}")
            if memory is not None:
                out[name] = memory.slot(place.region, place.offset, needed)
        return out

    def _tensors(self, limits: RequestLimits, memory: SharedMemory | None) -> list[Tensor]:
        here = sum(each.place is None for each in self.inputs)
        if self.raw and len(self.raw) != here:
            raise InvalidRequest(f"raw_input_contents has {len(self.raw)} entries for {here} inputs; send one for each")
        away = sum(each.place.size for each in self.inputs if each.place is not None)
        if away > limits.max_bytes:
            raise InvalidRequest(
                f"the inputs in shared memory have {away} bytes in all; the limit is {limits.max_bytes} "
                f"(--max-message-bytes). {limits.advice}"
            )
        spans = iter(self.raw)
        return [self._tensor(each, next(spans, None) if each.place is None else None, memory) for each in self.inputs]

    def _tensor(self, each: _Input, raw: tuple[int, int] | None, memory: SharedMemory | None) -> Tensor:
        dtype = dtype_of(each.name, each.datatype)
        if each.place is not None and memory is not None:
            copy = memory.slot(each.place.region, each.place.offset, each.place.size).read()
            values = validate.array(copy, 0, len(copy), dtype, each.name[:80])
        elif raw is None:
            values = _typed(self.body, each, self.budget)
        elif each.contents is not None and each.contents[0] != each.contents[1]:
            raise InvalidRequest(f"{each.name[:80]} has contents beside raw_input_contents; send one of them")
        else:
            values = validate.array(self.body, *raw, dtype, each.name[:80])
        return tensor_of(each.name, each.datatype, tuple(each.shape), values)


def read(body: bytes, *, shared: bool = False) -> InferRequest:
    """A serialized ModelInferRequest, not yet held against any schema. Raises InvalidRequest where it is none, or asks
    for what is not served: tensors in shared memory, unless they are ``shared``."""
    out = InferRequest(body)
    budget = out.budget
    parameters: dict[str, Parameter] = {}
    for found in budget.scan(body, 0, len(body)):
        number, _, start, stop = found
        if not 1 <= number <= 7:
            continue
        expect(found, LEN, f"ModelInferRequest field {number}")
        if number == 1:
            out.model_name = text(body, start, stop, "model_name")
        elif number == 2:
            out.model_version = text(body, start, stop, "model_version")
        elif number == 3:
            out.request_id = text(body, start, stop, "id")
        elif number == 4:
            _read_parameter(body, start, stop, budget, parameters)
        elif number == 5:
            out.inputs.append(_read_input(body, start, stop, budget, shared))
        elif number == 6:
            name, place = _read_output(body, start, stop, budget, shared)
            out.outputs.append(name)
            if place is not None:
                out.places[name] = place
        else:
            out.raw.append((start, stop))
    refuse(parameters, "the request")
    out.timeout_s = timeout_of(parameters.get("timeout"))
    priority = parameters.get("priority", 0)
    out.priority = priority if isinstance(priority, int) else 0
    return out


def encode(
    model_name: str,
    version: str,
    request_id: str,
    scores: Scores,
    names: Sequence[str],
    slots: Mapping[str, Slot] | None = None,
) -> bytes:
    """A serialized ModelInferResponse with these outputs, raw. Those with a slot are put there, and are empty in it."""
    out = put_text(1, model_name) + put_text(2, version) + put_text(3, request_id)
    raw = b""
    for task, values in picked(scores, names).items():
        out += put_len(5, _tensor_message(task, "FP32", values.shape))
        numbers = values.astype("<f4", copy=False).tobytes()
        if slots and task in slots:
            slots[task].write(numbers)
            numbers = b""
        raw += put_len(6, numbers)
    return out + raw


def encode_streamed(response: bytes) -> bytes:
    """A serialized ModelStreamInferResponse around a ModelInferResponse."""
    return put_len(2, response)


def encode_stream_error(message: str) -> bytes:
    """A serialized ModelStreamInferResponse that says what was wrong with one request."""
    return put_text(1, message)


def read_named(body: bytes) -> tuple[str, str]:
    """(name, version) of a request about one model."""
    names = {1: "", 2: ""}
    for found in scan(body, 0, len(body)):
        if found[0] in names:
            expect(found, LEN, "name" if found[0] == 1 else "version")
            names[found[0]] = text(body, found[2], found[3], "a name")
    return names[1], names[2]


def encode_flag(value: bool) -> bytes:
    """ServerLiveResponse, ServerReadyResponse and ModelReadyResponse."""
    return put_uint(1, int(value))


def encode_server(version: str, extensions: Sequence[str] = EXTENSIONS) -> bytes:
    """A serialized ServerMetadataResponse."""
    return put_text(1, "narsil") + put_text(2, version) + b"".join(put_text(3, each) for each in extensions)


def read_region(body: bytes) -> tuple[str, str, int, int]:
    """(name, key, offset, bytes) of a SystemSharedMemoryRegisterRequest."""
    texts, numbers = {1: "", 2: ""}, {3: 0, 4: 0}
    for found in scan(body, 0, len(body)):
        if found[0] in texts:
            expect(found, LEN, "name" if found[0] == 1 else "key")
            texts[found[0]] = text(body, found[2], found[3], "a name")
        elif found[0] in numbers:
            expect(found, VARINT, "offset" if found[0] == 3 else "byte_size")
            numbers[found[0]] = found[2]
    return texts[1], texts[2], numbers[3], numbers[4]


def encode_regions(regions: Sequence[Region]) -> bytes:
    """A serialized SystemSharedMemoryStatusResponse."""
    return b"".join(
        put_len(
            1,
            put_text(1, each.name)
            + put_len(
                2, put_text(1, each.name) + put_text(2, each.key) + put_uint(3, each.offset) + put_uint(4, each.size)
            ),
        )
        for each in regions
    )


def encode_metadata(name: str, versions: Sequence[str], backend: str, schema: ModelSchema) -> bytes:
    """A serialized ModelMetadataResponse."""
    out = put_text(1, name) + b"".join(put_text(2, version) for version in versions)
    out += put_text(3, f"narsil_{backend}")
    for number, tensors in ((4, inputs_of(schema)), (5, outputs_of(schema))):
        out += b"".join(put_len(number, _tensor_message(*each)) for each in tensors)
    return out


def encode_config(name: str, backend: str, schema: ModelSchema) -> bytes:
    """A serialized ModelConfigResponse. max_batch_size is left at 0: the first dimension is the model's own."""
    out = put_text(1, name) + put_text(2, f"narsil_{backend}")
    for number, dims, tensors in ((5, 4, inputs_of(schema)), (6, 3, outputs_of(schema))):
        for tensor, datatype, shape in tensors:
            config = put_text(1, tensor) + put_uint(2, _TRITON_TYPES[datatype]) + _sizes(dims, shape)
            out += put_len(number, config)
    return put_len(1, out + put_text(17, "narsil"))


def durations_of(counts: ModelCounts) -> dict[str, tuple[int, int]]:
    """A model's inference_stats: duration -> (how often, nanoseconds in all), in the order of the message's fields."""
    answered, ended = counts.ends["answered"], sum(counts.ends.values())
    seconds = {
        "success": (answered, counts.answered),
        "fail": (ended - answered, counts.failed),
        "queue": (ended, counts.queue),
        "compute_input": (ended, counts.collate),
        "compute_infer": (ended, counts.execute),
        "compute_output": (ended, counts.split),
    }
    return {name: (count, int(total * 1e9)) for name, (count, total) in seconds.items()}


def encode_statistics(models: Mapping[tuple[str, str], ModelCounts]) -> bytes:
    """A serialized ModelStatisticsResponse, of (name, version) -> counts."""
    out = b""
    for (name, version), counts in models.items():
        inner = b"".join(
            put_len(number, put_uint(1, count) + put_uint(2, nanoseconds))
            for number, (count, nanoseconds) in enumerate(durations_of(counts).values(), 1)
        )
        model = put_text(1, name) + put_text(2, version) + put_uint(3, int(counts.last * 1e3))
        out += put_len(1, model + put_uint(4, counts.rows) + put_uint(5, counts.batches) + put_len(6, inner))
    return out


def encode_index(models: Sequence[tuple[str, str, str, str]]) -> bytes:
    """A serialized RepositoryIndexResponse, of (name, version, state, reason)."""
    return b"".join(
        put_len(1, b"".join(put_text(number, value) for number, value in enumerate(each, 1) if value))
        for each in models
    )


def read_index_request(body: bytes) -> bool:
    """Whether a RepositoryIndexRequest asks for what is served alone. Raises InvalidRequest where it asks for a
    repository by name."""
    ready = False
    for number, kind, start, stop in scan(body, 0, len(body)):
        if number == 1:
            expect((number, kind, start, stop), LEN, "repository_name")
            _check_repository(text(body, start, stop, "repository_name"))
        elif number == 2:
            expect((number, kind, start, stop), VARINT, "ready")
            ready = bool(start)
    return ready


def read_repository_request(body: bytes) -> str:
    """The model that a RepositoryModelLoadRequest or UnloadRequest names. Raises InvalidRequest on parameters that
    would load something else than what lies in the repository."""
    name = ""
    for found in scan(body, 0, len(body)):
        number, _, start, stop = found
        if number not in (1, 2, 3):
            continue
        expect(found, LEN, f"field {number}")
        if number == 1:
            _check_repository(text(body, start, stop, "repository_name"))
        elif number == 2:
            name = text(body, start, stop, "model_name")
        else:
            key = next(
                (text(body, a, b, "a parameter") for field_, _, a, b in scan(body, start, stop) if field_ == 1), ""
            )
            check_load_parameters((key,))
    if not name:
        raise InvalidRequest("model_name is missing: say which model")
    return name


def check_load_parameters(names: Iterable[str]) -> None:
    """Raises InvalidRequest on one that would load something else than what lies in the repository."""
    for name in names:
        if name != "unload_dependents":
            raise InvalidRequest(
                f"the parameter {name[:80]!r} is not taken: a model is loaded as it lies in the repository, by its "
                "config.toml"
            )


def _check_repository(name: str) -> None:
    if name:
        raise InvalidRequest(f"there is one repository here, without a name, and none called {name[:80]!r}")


def _tensor_message(name: str, datatype: str, shape: Sizes) -> bytes:
    return put_text(1, name) + put_text(2, datatype) + _sizes(3, shape)


def _sizes(number: int, shape: Sizes) -> bytes:
    return put_len(number, b"".join(put_varint(size & 0xFFFFFFFFFFFFFFFF) for size in shape))


def _read_input(body: bytes, start: int, stop: int, budget: _Budget, shared: bool) -> _Input:
    out = _Input()
    parameters: dict[str, Parameter] = {}
    for found in budget.scan(body, start, stop):
        number, _, a, b = found
        if number == 3:
            out.shape += [_signed(size) for size in _uints(body, found, "shape")]
            if len(out.shape) > 8:
                raise InvalidRequest(f"input {out.name[:80]!r} has more than 8 dimensions")
        elif number in (1, 2, 4, 5):
            expect(found, LEN, f"InferInputTensor field {number}")
            if number == 1:
                out.name = text(body, a, b, "an input's name")
            elif number == 2:
                out.datatype = text(body, a, b, "datatype")
            elif number == 4:
                _read_parameter(body, a, b, budget, parameters)
            else:
                out.contents = (a, b)
    out.place = _placed(parameters, f"input {out.name[:80]!r}", shared)
    return out


def _read_output(body: bytes, start: int, stop: int, budget: _Budget, shared: bool) -> tuple[str, _Place | None]:
    name = ""
    parameters: dict[str, Parameter] = {}
    for found in budget.scan(body, start, stop):
        number, _, a, b = found
        if number in (1, 2):
            expect(found, LEN, f"InferRequestedOutputTensor field {number}")
        if number == 1:
            name = text(body, a, b, "an output's name")
        elif number == 2:
            _read_parameter(body, a, b, budget, parameters)
    return name, _placed(parameters, f"output {name[:80]!r}", shared)


def _placed(parameters: dict[str, Parameter], where: str, shared: bool) -> _Place | None:
    """Where in shared memory a tensor is, by its parameters; all others of what is not served are refused."""
    region = parameters.pop(_REGION, "") if shared else ""
    refuse(parameters, where)
    if not region:
        return None
    offset, size = parameters.get(_REGION_OFFSET, 0), parameters.get(_REGION_SIZE, 0)
    if not isinstance(region, str) or not isinstance(offset, int) or not isinstance(size, int):
        raise InvalidRequest(f"{where}: {_REGION} must be a text, and its byte_size and offset whole numbers")
    if offset < 0 or size < 0:
        raise InvalidRequest(f"{where}: shared memory from {offset} on, {size} bytes: neither may be negative")
    return _Place(region, offset, size)


def _read_parameter(body: bytes, start: int, stop: int, budget: _Budget, into: dict[str, Parameter]) -> None:
    """One entry of a map of InferParameters."""
    key, value = "", (0, 0)
    for found in budget.scan(body, start, stop):
        if found[0] in (1, 2):
            expect(found, LEN, "a parameter")
            if found[0] == 1:
                key = text(body, found[2], found[3], "a parameter's name")
            else:
                value = (found[2], found[3])
    for number, kind, a, b in budget.scan(body, *value):
        if number == 1 and kind == VARINT:
            into[key] = bool(a)
        elif number == 2 and kind == VARINT:
            into[key] = _signed(a)
        elif number == 3 and kind == LEN:
            into[key] = text(body, a, b, f"parameter {key[:80]}")
        elif number == 4 and kind == FIXED64:
            into[key] = float(np.frombuffer(body, "<f8", 1, a)[0])
        elif number == 5 and kind == VARINT:
            into[key] = a


def refuse(parameters: Mapping[str, Any], where: str) -> None:
    """Raises InvalidRequest where a parameter asks for what is not served and would change the answer's meaning."""
    for key, why in _REFUSED.items():
        if parameters.get(key):  # 0, false and empty ask for nothing
            raise InvalidRequest(f"{where} has the parameter {key}: {why}")


def timeout_of(microseconds: Any) -> float | None:
    """Seconds of the parameter timeout; 0 is none, as Triton has it. Raises InvalidRequest."""
    if not microseconds:
        return None
    if not isinstance(microseconds, int) or microseconds is True or not 0 <= microseconds < 1 << 63:
        raise InvalidRequest("the parameter timeout must be a number of microseconds, 0 or more")
    return microseconds / 1e6


def _typed(body: bytes, each: _Input, budget: _Budget) -> NDArray[Any]:
    """The numbers of an input that is not raw."""
    known = _TYPED.get(each.datatype)
    if known is None:
        raise InvalidRequest(f"{each.name[:80]}: {each.datatype} has no typed contents; send it in raw_input_contents")
    wanted, name = known
    parts: list[NDArray[Any]] = []
    for found in budget.scan(body, *(each.contents or (0, 0))):
        if found[0] != wanted:
            raise InvalidRequest(f"{each.name[:80]} is {each.datatype}: its numbers must be in contents.{name}")
        if found[1] != LEN:
            raise InvalidRequest(
                f"{each.name[:80]}: contents.{name} must be packed, as every protobuf runtime writes it"
            )
        if wanted in (6, 7):
            parts.append(validate.array(body, found[2], found[3], dtype_of(each.name, each.datatype), each.name[:80]))
        else:
            wide = _packed_varints(body, found[2], found[3])
            parts.append(wide.astype(np.uint32).view(np.int32) if wanted == 2 else wide.view(np.int64))
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype_of(each.name, each.datatype)), *parts])


def _packed_varints(body: bytes, start: int, stop: int) -> NDArray[np.uint64]:
    """All varints in body[start:stop]."""
    octets = np.frombuffer(body, np.uint8, stop - start, start)
    if not len(octets):
        return np.empty(0, np.uint64)
    ends = np.flatnonzero(octets < 0x80)
    if not len(ends) or ends[-1] != len(octets) - 1:
        raise malformed(stop, "a varint does not end")
    begins = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - begins + 1
    if int(lengths.max()) > 10:
        raise malformed(start, "a varint does not end")
    places = np.arange(len(octets)) - np.repeat(begins, lengths)
    parts = (octets & 0x7F).astype(np.uint64) << (7 * places).astype(np.uint64)
    return np.bitwise_or.reduceat(parts, begins)


def _uints(body: bytes, found: Field, name: str) -> list[int]:
    if found[1] == VARINT:
        return [found[2]]
    expect(found, LEN, name)
    if found[3] - found[2] > 80:
        raise InvalidRequest(f"{name} has more than 8 dimensions")
    return [int(value) for value in _packed_varints(body, found[2], found[3])]


def _signed(value: int) -> int:
    """An int64 field's value from its varint."""
    return value - (1 << 64) if value >> 63 else value
