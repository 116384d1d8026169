"""Writes the seed corpus: right messages of every form, and whole conversations. Needs an environment with Narsil.

Run from the repository's root: python csrc/fuzz/make_corpus.py
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.conformance.http2_client import frame, request_headers, settings
from tests.http2_peer import grpc_message, hpack
from tests.messages import inference_pb2, narsil_pb2, predictor_pb2

CORPUS = Path(__file__).parent / "corpus"
# As in decode.cpp: dense columns, rows of each table, ids are int64; and the models' names.
SCHEMAS = [(3, [50, 7, 1000, 20], False), (2, [5, 1 << 40], True), (0, [3], False)]
NAMES = ["fake", "wide", "one"]


def message(schema: int, wire: int, longest: int | None, rows: int, plain: bool) -> bytes:
    """One for decode.cpp, its first byte included."""
    dense_dim, tables, wide = SCHEMAS[schema]
    random = np.random.default_rng(rows)
    shape = (rows, len(tables)) if wire else (len(tables), rows)
    lengths = np.ones(shape, np.int32) if longest is None else random.integers(0, longest + 1, shape).astype(np.int32)
    limits = np.minimum(np.broadcast_to(tables if wire else np.array(tables)[:, None], shape), 1 << 31)
    values = random.integers(0, np.repeat(limits.ravel(), lengths.ravel()))
    dense = random.random((rows, dense_dim), dtype=np.float32).tobytes()
    out: predictor_pb2.PredictionRequest | narsil_pb2.PredictRequest
    if wire:
        name, request_id = ("", "") if plain else (NAMES[schema], "r")
        out = narsil_pb2.PredictRequest(batch_size=rows, dense=dense, model_name=name, request_id=request_id)
        out.sparse.num_features, out.sparse.id_type = len(tables), int(wide or not plain)
        out.sparse.values = values.astype(np.int64 if wide or not plain else np.int32).tobytes()
        if longest is not None or not plain:
            out.sparse.lengths = lengths.tobytes()
    else:
        out = predictor_pb2.PredictionRequest(
            batch_size=rows,
            float_features={"num_features": dense_dim, "values": dense},
            id_list_features={
                "num_features": len(tables),
                "lengths": lengths.tobytes(),
                "values": values.astype(np.int32).tobytes(),
            },
        )
        if not plain:
            out.embedding_features.num_features = 0
    return bytes([schema << 1 | wire]) + out.SerializeToString()


def unsaid(schema: int, ids: str, lengths: str, rows: int) -> bytes:
    """For decode.cpp, on TorchRec's wire: without batch_size, ids and lengths of these types."""
    dense_dim, tables, _ = SCHEMAS[schema]
    random = np.random.default_rng(rows)
    counts = random.integers(0, 3, len(tables) * rows)
    out = predictor_pb2.PredictionRequest(
        float_features={"num_features": dense_dim, "values": bytes(4 * dense_dim * rows)},
        id_list_features={
            "num_features": len(tables),
            "lengths": counts.astype(lengths).tobytes(),
            "values": random.integers(0, 3, counts.sum()).astype(ids).tobytes(),
        },
    )
    return bytes([schema << 1]) + out.SerializeToString()


def tensors(schema: int, form: str, kind: str, counts: str, rows: int) -> bytes:
    """For decode.cpp, on the Open Inference Protocol: ids of one form, ids and lengths of these datatypes."""
    dense_dim, tables, _ = SCHEMAS[schema]
    random = np.random.default_rng(rows)
    lengths = random.integers(0, 3, (rows, len(tables)))
    ids = lambda shape: ((kind, random.integers(0, 3, shape)))  # noqa: E731
    found: dict[str, tuple[str, np.ndarray]] = {}
    if form == "ids":
        found["ids"] = ids(lengths.shape)
    elif form == "features":
        for name, each in zip("fghi", lengths.T, strict=False):
            found[name + ".values"], found[name + ".lengths"] = ids(each.sum()), (counts, each)
        found["f"] = ids((rows, 2))
        del found["f.values"], found["f.lengths"]
    else:
        turned = lengths if form == "bags" else lengths.T
        name = "ids" if form == "bags" else form
        found[name + ".values"], found[name + ".lengths"] = ids(lengths.sum()), (counts, turned)
    if dense_dim:
        found["dense"] = "FP32", random.random((rows, dense_dim), np.float32)
    out = inference_pb2.ModelInferRequest(model_name=NAMES[schema] if form == "bags" else "")
    for name, (datatype, values) in found.items():
        out.inputs.add(name=name, datatype=datatype, shape=values.shape)
        out.raw_input_contents.append(
            values.astype({"FP32": "<f4", "INT32": "<i4", "INT64": "<i8"}[datatype]).tobytes()
        )
    if rows > 1:
        out.outputs.add(name="b")
        out.outputs.add(name="a")
    return bytes([0x80 | schema << 1]) + out.SerializeToString()


def fed(data: bytes, piece: int = 0xDF) -> bytes:
    """Commands of session.cpp that feed the data in pieces."""
    return b"".join(bytes([len(data[at : at + piece])]) + data[at : at + piece] for at in range(0, len(data), piece))


def call(stream: int, path: str, *messages: bytes, end: bool = True, **options: str) -> bytes:
    """HEADERS and DATA."""
    extra = [(name.replace("_", "-"), value) for name, value in options.items()]
    out = frame(1, 4, stream, hpack(request_headers(path, extra)))
    for number, one in enumerate(messages):
        out += frame(0, int(end and number == len(messages) - 1), stream, grpc_message(one))
    return out


def conversations() -> dict[str, bytes]:
    """For session.cpp, by name."""
    hello, right = settings(_4=20), message(0, 0, None, 1, True)[1:]
    reset = frame(3, 0, 1, struct.pack(">I", 8))
    window = frame(8, 0, 1, struct.pack(">I", 100_000)) + frame(8, 0, 0, struct.pack(">I", 100_000))
    block = hpack(request_headers("/p"))
    large = block + b"\x40" + hpack([("x", "v" * 70_000)])[1:]
    parts = [large[at : at + 16_000] for at in range(0, len(large), 16_000)]
    long_value = frame(1, 0, 1, parts[0]) + b"".join(frame(9, 0, 1, part) for part in parts[1:-1])
    long_value += frame(9, 4, 1, parts[-1])
    named = [("narsil-model", "fake"), ("narsil-model-version", "1")]
    return {
        "answered": fed(hello + call(1, "/p", right)) + b"\xe0\x05" + fed(window),
        "large_answer": fed(hello + call(1, "/p", right)) + b"\xe1\x00" + fed(window) + fed(window),
        "named": fed(
            b"".join(
                frame(1, 4, stream, hpack(request_headers("/p", [*named, *extra]))) + frame(0, 1, stream, right)
                for stream, extra in ((1, []), (3, named[:1]))
            )
        )
        + b"\xe0\x05",
        "failed": fed(call(1, "/n", b"x")) + b"\xe2\x09",
        "bytewise": fed(hello + call(1, "/u.U/u", b"ab"), 1) + b"\xe0\x05",
        "stream": fed(call(1, "/s", b"a", b"b", b"c")) + b"\xe0\x01\xe0\x01\xe0\x01\xe0\x01" + fed(window),
        "stream_flood": fed(call(1, "/s", *[b"a"] * 20, end=False)) + b"\xe1\x00" + fed(window) + b"\xe0\x00",
        "health": fed(call(1, "/h/Check", b"") + call(3, "/h/Watch", b"") + call(5, "/h/Watch", b"\x0a\x01h"))
        + b"\xe8",
        "watchers": fed(call(1, "/h/Watch", b"") + call(3, "/h/Watch", b"") + call(5, "/h/Watch", b"")) + b"\xe4\xe8",
        "reset": fed(hello + call(1, "/p", right)) + fed(reset) + b"\xe0\x03",
        "reset_at_once": fed(call(1, "/p", right) + reset),
        "two_messages": fed(call(1, "/p", right, right)),
        "half": fed(call(1, "/p", right)[:-3]) + b"\xe4",
        "too_large": fed(frame(1, 4, 1, block) + frame(0, 0, 1, grpc_message(b"", length=5000))),
        "compressed": fed(frame(1, 4, 1, block) + frame(0, 0, 1, grpc_message(b"x", flag=1))),
        "budget": fed(b"".join(call(1 + 2 * n, "/u.U/u", bytes(900), end=False) for n in range(6))) + b"\xe0\x00",
        "no_method": fed(call(1, "/x", b"")),
        "no_grpc": fed(
            frame(1, 5, 1, hpack(request_headers(method="GET"))) + frame(1, 5, 3, hpack(request_headers(kind="a")))
        ),
        "timeouts": fed(call(1, "/p", b"x", grpc_timeout="5m") + call(3, "/p", b"x", grpc_timeout="5x")),
        "large_headers": fed(call(1, "/p", b"x", x="y" * 400) + call(3, "/p", b"x", x="y" * 3000)),
        "continuation": fed(frame(1, 0, 1, block[:20]) + frame(9, 0, 1, b"") + frame(9, 4, 1, block[20:])),
        "long_value": fed(long_value + call(3, "/p", right), 0xD0) + b"\xe0\x05",
        "block_without_end": fed(call(1, "/p", right) + frame(1, 0, 3, block) + frame(9, 0, 3) * 130, 0xD0)
        + b"\xe0\x05",
        "block_half_there": fed(frame(1, 0, 1, block)) + b"\xe4",
        "padding": fed(
            frame(1, 12, 1, b"\x03" + block + bytes(3)) + frame(0, 9, 1, b"\x02" + grpc_message(b"x") + bytes(2))
        ),
        "trailers": fed(call(1, "/p", right, end=False) + frame(1, 5, 1, hpack([("grpc-timeout", "1n")])))
        + b"\xe0\x01",
        "odd_frames": fed(frame(2, 0, 1, bytes(5)) + frame(6, 0, 0, b"12345678") + frame(0x42, 0, 0, b"?")),
        "goaway": fed(call(1, "/p", right)) + b"\xe6" + fed(call(3, "/p", right)) + b"\xe0\x00\xe7",
        "refusing": b"\xe9" + fed(call(1, "/p", right)),
        "dropped": fed(call(1, "/p", right)) + b"\xea\xeb",
        "ends": fed(call(1, "/p", right)) + b"\xeb",
    }


def main() -> None:
    """Replaces what is there."""
    for folder in ("decode", "session"):
        (CORPUS / folder).mkdir(parents=True, exist_ok=True)
    for schema, wire in ((s, w) for s in range(len(SCHEMAS)) for w in (0, 1)):
        for longest in (None, 0, 3):
            for plain in (True, False):
                name = f"{('predictor', 'narsil')[wire]}_{schema}_{longest}_{'plain' if plain else 'full'}"
                (CORPUS / "decode" / name).write_bytes(message(schema, wire, longest, 2 if longest else 3, plain))
        for named in (1, 2, 3):  # of decode.cpp's NAMES
            right = message(schema, wire, 3, 2, True)
            name = f"{('predictor', 'narsil')[wire]}_{schema}_named_{named}"
            (CORPUS / "decode" / name).write_bytes(bytes([right[0] | named << 4]) + right[1:])
    for schema in range(len(SCHEMAS)):
        for ids, lengths in (("<i8", "<i4"), ("<i4", "<i4"), ("<i8", "<i8")):
            name = f"predictor_{schema}_unsaid_{ids[1:]}_{lengths[1:]}"
            (CORPUS / "decode" / name).write_bytes(unsaid(schema, ids, lengths, 2))
    for schema in range(len(SCHEMAS)):
        for form in ("ids", "bags", "id_list_features", "id_score_list_features", "features"):
            for kind, counts in (("INT32", "INT32"), ("INT64", "INT64"), ("INT32", "INT64")):
                name = f"oip_{schema}_{form}_{kind}_{counts}"
                (CORPUS / "decode" / name).write_bytes(tensors(schema, form, kind, counts, 2 if kind == counts else 1))
    for name, data in conversations().items():
        (CORPUS / "session" / name).write_bytes(data)


if __name__ == "__main__":
    main()
