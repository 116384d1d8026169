"""ModelInferRequests of the Open Inference Protocol as hypothesis makes them: right in every form, and spoiled."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from narsil.artifacts.schema import ModelSchema
from tests.messages import inference_pb2 as pb

METHOD = "/inference.GRPCInferenceService/ModelInfer"
FORMS = ("ids", "bags", "id_list_features", "id_score_list_features", "features")
_RAW = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "INT32": "<i4", "INT64": "<i8"}
_TYPED = {"FP32": "fp32_contents", "FP64": "fp64_contents", "INT32": "int_contents", "INT64": "int64_contents"}
# What is right, and not for native code to read.
UNUSUAL = ("typed", "FP64", "FP16", "parameter", "no ids for a row", "a name that is not ASCII")

Tensors = list[tuple[str, str, NDArray[Any]]]  # name, datatype, values


@st.composite
def infer_requests(draw: Any, schema: ModelSchema) -> tuple[pb.ModelInferRequest, bool]:
    """A request that is right in every point, and whether it is of the common form, which native code has to read."""
    rows = draw(st.integers(1, 12))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    form = draw(st.sampled_from(FORMS))
    unusual = draw(st.none() | st.none() | st.none() | st.sampled_from(UNUSUAL))
    if unusual == "no ids for a row":
        form = "features"
    tensors = _ids(draw, random, form, schema, rows, none=unusual == "no ids for a row")
    if schema.dense_dim:
        columns = random.standard_normal((rows, schema.dense_dim), dtype=np.float32)
        kind = unusual if unusual in ("FP64", "FP16") else "FP32"
        tensors.append((draw(st.sampled_from(["dense", "float_features"])), kind, columns))
    elif unusual in ("FP64", "FP16"):
        unusual = None
    request = pb.ModelInferRequest(
        model_name=draw(st.sampled_from(["", "fake"])), model_version=draw(st.sampled_from(["", "1"]))
    )
    request.id = "naïve" if unusual == "a name that is not ASCII" else draw(st.sampled_from(["", "r1"]))
    if unusual == "parameter":
        request.parameters["priority"].int64_param = 1
    for task in draw(st.sampled_from([(), schema.tasks, schema.tasks[::-1], schema.tasks[:1]])):
        request.outputs.add(name=task)
    for name, kind, values in draw(st.permutations(tensors)):
        tensor = request.inputs.add(name=name, datatype=kind, shape=values.shape)
        if unusual == "typed":
            getattr(tensor.contents, _TYPED[kind]).extend(values.ravel().tolist())
        else:
            request.raw_input_contents.append(values.astype(_RAW[kind]).tobytes())
    return request, unusual is None


def _ids(draw: Any, random: np.random.Generator, form: str, schema: ModelSchema, rows: int, *, none: bool) -> Tensors:
    vast = bool((schema.rows > 1 << 31).any()) and draw(st.booleans())  # ids that int32 does not hold
    longest = draw(st.sampled_from([None, 0, 1, 3]))
    limits = schema.rows if vast else np.minimum(schema.rows, 1 << 31)
    width = lambda: "INT64" if vast or draw(st.booleans()) else "INT32"  # noqa: E731
    count = lambda: draw(st.sampled_from(["INT32", "INT32", "INT64"]))  # noqa: E731
    if form == "features":
        out: Tensors = []
        for position, feature in enumerate(schema.features):
            limit, alone = int(limits[position]), longest is None or draw(st.booleans())
            if none and position == 0:
                out.append((feature.name, width(), np.empty((rows, 0), int)))
            elif alone:
                shape = draw(st.sampled_from([(rows,), (rows, 1)] + ([(rows, 2)] if longest is not None else [])))
                out.append((feature.name, width(), random.integers(0, limit, shape)))
            else:
                lengths = random.integers(0, (longest or 0) + 1, rows)
                out.append((feature.name + ".values", width(), random.integers(0, limit, int(lengths.sum()))))
                out.append((feature.name + ".lengths", count(), lengths))
        return out
    key_major = form.startswith("id_")
    shape = (len(limits), rows) if key_major else (rows, len(limits))
    each = np.broadcast_to(limits[:, None] if key_major else limits, shape)
    if form == "ids":
        return [("ids", width(), random.integers(0, each))]
    lengths = np.ones(shape, int) if longest is None else random.integers(0, longest + 1, shape)
    values = random.integers(0, np.repeat(each.ravel(), lengths.ravel()))
    if key_major and draw(st.booleans()):
        lengths = lengths.ravel()
    name = "ids" if form == "bags" else form
    return [(name + ".values", width(), values), (name + ".lengths", count(), lengths)]


@st.composite
def spoiled(draw: Any, request: pb.ModelInferRequest) -> pb.ModelInferRequest:
    """The request with one or two of its parts changed; often wrong then, and sometimes right in another way."""
    out = pb.ModelInferRequest()
    out.CopyFrom(request)
    for _ in range(draw(st.integers(1, 2))):
        _SPOILERS[draw(st.sampled_from(sorted(_SPOILERS)))](draw, out)
    return out


def _shape(draw: Any, out: pb.ModelInferRequest) -> None:
    sizes = out.inputs[draw(st.integers(0, len(out.inputs) - 1))].shape
    kind = draw(st.sampled_from(["set", "add", "drop", "turn", "times"]))
    if kind == "add" or not sizes:
        sizes.append(draw(st.sampled_from([0, 1, 2, -1, 1 << 62])))
    elif kind == "set":
        sizes[draw(st.integers(0, len(sizes) - 1))] = draw(
            st.sampled_from([0, 1, 2, 3, -1, -(2**63), 2**63 - 1, 1 << 32])
        )
    elif kind == "drop":
        del sizes[-1]
    elif kind == "turn":
        sizes[:] = sizes[::-1]
    else:  # two sizes whose product is the number in 64 bits alone
        sizes[:] = [sizes[0] + (1 << 32), 1 << 32] if len(sizes) > 1 else [1 << 33, 1 << 31, sizes[0]]


def _raw(draw: Any, out: pb.ModelInferRequest) -> None:
    if not out.raw_input_contents:
        return
    place = draw(st.integers(0, len(out.raw_input_contents) - 1))
    kind = draw(st.sampled_from(["drop", "add", "cut", "more", "number", "last number", "empty"]))
    raw = bytearray(out.raw_input_contents[place])
    if kind == "drop":
        del out.raw_input_contents[place]
        return
    if kind == "add":
        out.raw_input_contents.append(draw(st.binary(max_size=8)))
        return
    if kind == "cut":
        del raw[-draw(st.sampled_from([1, 4, 8])) :]
    elif kind == "more":
        raw += draw(st.sampled_from([b"\0", bytes(4), bytes(8)]))
    elif kind == "empty":
        raw.clear()
    elif raw:
        size = draw(st.sampled_from([4, 8]))
        value = draw(st.sampled_from([0, 1, 2, 3, 5, 49, 50, -1, 2**31 - 1, -(2**31), 1 << 32, (1 << 32) + 1, 1 << 62]))
        at = len(raw) - size if kind == "last number" else size * draw(st.integers(0, 30))
        if 0 <= at <= len(raw) - size:
            raw[at : at + size] = (value & (2 ** (8 * size) - 1)).to_bytes(size, "little")
    out.raw_input_contents[place] = bytes(raw)


def _input(draw: Any, out: pb.ModelInferRequest) -> None:
    place = draw(st.integers(0, len(out.inputs) - 1))
    tensor = out.inputs[place]
    kind = draw(st.sampled_from(["name", "datatype", "twice", "swap", "contents", "parameter", "drop"]))
    if kind == "name":
        tensor.name = draw(
            st.sampled_from(
                ["", "dense", "float_features", "ids", "ids.values", "ids.weights", "other", tensor.name + ".values"]
            )
        )
    elif kind == "datatype":
        tensor.datatype = draw(st.sampled_from(["", "FP32", "FP64", "INT32", "INT64", "BYTES", "UINT32", "BF16"]))
    elif kind == "twice":
        out.inputs.add().CopyFrom(tensor)
        out.raw_input_contents.extend(out.raw_input_contents[place : place + 1])
    elif kind == "swap":
        other = out.inputs[draw(st.integers(0, len(out.inputs) - 1))]
        tensor.name, other.name = other.name, tensor.name
    elif kind == "contents":
        tensor.contents.int_contents.extend(draw(st.lists(st.integers(0, 3), max_size=2)))
    elif kind == "parameter":
        tensor.parameters["binary_data_size"].int64_param = 4
    else:
        del out.inputs[place]
        del out.raw_input_contents[place : place + 1]
        if not out.inputs:
            out.inputs.add()


def _rest(draw: Any, out: pb.ModelInferRequest) -> None:
    kind = draw(st.sampled_from(["output", "output twice", "model", "version", "unknown", "sequence", "classes"]))
    if kind == "output":
        out.outputs.add(name=draw(st.sampled_from(["", "default", "other"])))
    elif kind == "output twice":
        out.outputs.add(name="default")
        out.outputs.add(name="default")
    elif kind == "model":
        out.model_name = draw(st.sampled_from(["other", "fak", "fakee"]))
    elif kind == "version":
        out.model_version = draw(st.sampled_from(["2", "11"]))
    elif kind == "unknown":
        out.MergeFromString(draw(st.sampled_from([b"\x40\x01", b"\x4a\x00", b"\x7a\x01x"])))
    elif kind == "sequence":
        out.parameters["sequence_id"].int64_param = 4
    else:
        out.outputs.add(name="default").parameters["classification"].int64_param = 1


_SPOILERS = {"shape": _shape, "raw": _raw, "input": _input, "rest": _rest, "ids": _raw}
