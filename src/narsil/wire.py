"""Reading and writing the protobuf encoding by hand, without message objects and without copying payloads.

Both ends of Narsil's wires use it: the server's codecs, and the client. Source of the format:
https://protobuf.dev/programming-guides/encoding/. Every byte is hostile: each read is checked against the end of its
message.
"""

from __future__ import annotations

from collections.abc import Sequence

from narsil.errors import InvalidRequest

# Names that both ends use: the methods of narsil.v1.Inference and TorchRec's, and the metadata that names a model.
PREDICT, GET_MODEL = "/narsil.v1.Inference/Predict", "/narsil.v1.Inference/GetModel"
_OPEN_INFERENCE = "/inference.GRPCInferenceService/"
INDEX, LOAD, UNLOAD = (
    _OPEN_INFERENCE + method for method in ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload")
)
PREDICT_TORCHREC = "/predictor.Predictor/Predict"
MODEL_KEY, VERSION_KEY = "narsil-model", "narsil-model-version"

VARINT, FIXED64, LEN, FIXED32 = 0, 1, 2, 5

# More fields than any honest message has: a model's features named one by one, and some to spare. Without a limit, a
# message of empty fields would cost a thousand times its size in time and memory.
MAX_FIELDS = 10_000

# (field number, wire type, a, b): LEN fields span data[a:b]; for a VARINT a is the value; fixed fields span data[a:b].
Field = tuple[int, int, int, int]

Part = bytes | memoryview  # of a message that is being written; joined once, when it is whole


def scan(data: bytes, start: int, stop: int) -> list[Field]:
    """The fields of the message in data[start:stop], in the order in which they come.

    Raises InvalidRequest where the bytes are not a protobuf message.
    """
    fields: list[Field] = []
    at = start
    while at < stop:
        if len(fields) == MAX_FIELDS:
            raise malformed(at, f"more than {MAX_FIELDS} fields")
        byte = data[at]
        if byte < 0x80:
            key, at = byte, at + 1
        else:
            key, at = varint(data, at, stop)
        kind = key & 7
        number = key >> 3
        if not 0 < number < 1 << 29:
            raise malformed(at, f"field number {number}")
        if kind == LEN:
            size, at = varint(data, at, stop)
            end = at + size
            if end > stop:
                raise malformed(at, f"field {number} claims {size} bytes and {stop - at} are left")
            fields.append((number, kind, at, end))
            at = end
        elif kind == VARINT:
            value, at = varint(data, at, stop)
            fields.append((number, kind, value, 0))
        elif kind in (FIXED32, FIXED64):
            end = at + (4 if kind == FIXED32 else 8)
            if end > stop:
                raise malformed(at, f"field {number} is cut off")
            fields.append((number, kind, at, end))
            at = end
        else:
            raise malformed(at, f"field {number} has wire type {kind}")
    return fields


def varint(data: bytes, at: int, stop: int) -> tuple[int, int]:
    """(unsigned value, position after it) of the varint at ``at``; at most ten bytes, 64 bits."""
    value = shift = 0
    while at < stop:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
        if shift > 63:
            break
    raise malformed(at, "a varint does not end")


def expect(field: Field, kind: int, name: str) -> None:
    """Raises InvalidRequest unless the field has this wire type."""
    if field[1] != kind:
        raise InvalidRequest(
            f"{name} has protobuf wire type {field[1]}, expected {kind}: is the client's .proto the same?"
        )


def signed32(value: int) -> int:
    """An int32 field's value from its varint: the low 32 bits, two's complement, as every protobuf runtime reads it."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value & 0x80000000 else value


def packed_uints(data: bytes, field: Field, name: str) -> list[int]:
    """A repeated uint32: packed, or one by one, as protobuf allows both."""
    if field[1] == VARINT:
        return [field[2]]
    expect(field, LEN, name)
    values, at = [], field[2]
    while at < field[3]:
        value, at = varint(data, at, field[3])
        values.append(value)
    return values


def text(data: bytes, start: int, stop: int, name: str) -> str:
    """A string field. Raises InvalidRequest where it is not UTF-8."""
    try:
        return data[start:stop].decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{name} is not UTF-8") from None


def malformed(at: int, what: str) -> InvalidRequest:
    """The error for bytes that are no protobuf message."""
    return InvalidRequest(f"not a valid protobuf message: at byte {at}: {what}")


def put_varint(value: int) -> bytes:
    """An unsigned varint."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def put_len(number: int, payload: bytes) -> bytes:
    """A length-delimited field: a string, bytes, packed numbers or a message."""
    return put_varint(number << 3 | LEN) + put_varint(len(payload)) + payload


def put_uint(number: int, value: int) -> bytes:
    """A varint field; nothing for zero, as proto3 has it."""
    return put_varint(number << 3) + put_varint(value) if value else b""


def put_text(number: int, value: str) -> bytes:
    """A string field; nothing for an empty one, as proto3 has it."""
    return put_len(number, value.encode()) if value else b""


def put_parts(number: int, parts: Sequence[Part]) -> list[Part]:
    """A length-delimited field whose payload is not put together yet; nothing of it is copied."""
    return [put_varint(number << 3 | LEN) + put_varint(sum(map(len, parts))), *parts]
