"""What native code makes of a message, beside what the portable codec makes of it. Through a real plane and socket."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narsil.artifacts.schema import Feature, ModelSchema
from narsil.bench.workload import oip_body
from narsil.catalog.catalog import Catalog
from narsil.client import build_request
from narsil.dataflow import Features, Jagged, OneHot, StageTimes
from narsil.engine.collate import Collator
from narsil.engine.served_model import RequestLimits
from narsil.errors import InvalidRequest, ModelNotFound
from narsil.extension import AVAILABLE, NativeFeatures
from narsil.transports.codec import narsil_v1, oip, predictor
from narsil.transports.endpoints import ENDPOINTS, Metadata
from narsil.wire import put_len, put_uint
from tests import oip_messages
from tests.messages import inference_pb2, narsil_pb2, predictor_pb2
from tests.support import SCHEMA, fake_model, one_hot

if not AVAILABLE:
    pytest.skip("built without the native extension", allow_module_level=True)

from narsil._native import Call, Model, Plane, collate
from tests.conformance.http2_client import Answer, RawClient

LIMITS = RequestLimits(max_rows=60, max_ids=2000)
WIDE = ModelSchema(
    dense_dim=2,
    features=(Feature("small", "t_small", rows=5, dim=4), Feature("vast", "t_vast", rows=1 << 40, dim=4)),
)
ONE = ModelSchema(dense_dim=0, features=(Feature("only", "t_only", rows=3, dim=4),))
SEVERAL = replace(SCHEMA, tasks=("a", "b", "c"), widths=())
GAPS = SCHEMA.taking_nan((0, 2))
SIGNED = replace(
    SCHEMA,
    features=(replace(SCHEMA.features[0], least=-(2**31)), replace(SCHEMA.features[1], least=-5), *SCHEMA.features[2:]),
)
VAST = replace(WIDE, features=(WIDE.features[0], replace(WIDE.features[1], rows=2**63 - 1, least=-(2**63))))
SCHEMAS = {"narrow": SCHEMA, "wide": WIDE, "one": ONE, "several": SEVERAL, "gaps": GAPS, "signed": SIGNED, "vast": VAST}
SLOW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def native_model(schema: ModelSchema, name: str = "fake", version: str = "1", served: object = None) -> Model:
    return Model(
        served,
        name=name,
        version=version,
        dense_dim=schema.dense_dim,
        nan_columns=list(schema.nan_columns),
        rows=schema.rows.tolist(),
        least=schema.least.tolist(),
        wide_ids=schema.id_dtype.itemsize == 8,
        max_rows=LIMITS.max_rows,
        max_ids=LIMITS.max_ids,
        features=[feature.name for feature in schema.features],
        tasks=schema.tasks,
    )


class Loop:
    """A plane, one connection to it, and one thread that is client, network and lane in turn."""

    def __init__(self, schema: ModelSchema, path: str) -> None:
        self.schema = schema
        self.catalog = Catalog([fake_model(schema=schema, limits=LIMITS)])
        self.wires = {each.method: each.wire for each in ENDPOINTS if each.wire}
        kinds: dict[str, Any] = {predictor.METHOD: "predictor", narsil_v1.METHOD: "narsil", oip_messages.METHOD: "oip"}
        self.plane = Plane(kinds)
        self.plane.serve([native_model(schema)])
        self.plane.listen_unix(path)
        self._client = RawClient(f"unix:{path}")
        self._streams: dict[int, int] = {}

    def take(self, method: str, body: bytes) -> Call:
        """The message as the plane hands it out."""
        stream = self._client.call(body, method)
        while True:
            calls, _ = self.plane.poll(10)
            if calls:
                self._streams[calls[0].id] = stream
                return calls[0]

    def end(self, call: Call) -> Answer:
        """What the client gets, once the call has been answered."""
        self.plane.flush()
        return self._client.answer(self._streams.pop(call.id))

    def decode(self, method: str, body: bytes) -> Features | None:
        """What native code reads, or None where it leaves the message alone."""
        call = self.take(method, body)
        assert call.body == body
        features = NativeFeatures(call).portable() if call.decoded else None
        call.fail(0, "")
        self.end(call)
        return features

    def portable(self, method: str, body: bytes) -> Features | None:
        """What the portable codec reads, or None where it refuses."""
        try:
            return self.wires[method].decode(body, Metadata(), self.catalog).features
        except (InvalidRequest, ModelNotFound):
            return None

    def close(self) -> None:
        self._client.socket.close()
        self.plane.stop(0)


@pytest.fixture(scope="module")
def loops(tmp_path_factory) -> Iterator[dict[str, Loop]]:
    folder = tmp_path_factory.mktemp("planes")
    made = {name: Loop(schema, str(folder / name)) for name, schema in SCHEMAS.items()}
    yield made
    for loop in made.values():
        loop.close()


def same(one: Features, other: Features, schema: ModelSchema) -> None:
    """Equal in every row, whatever the layout."""
    assert (one.rows, one.ids) == (other.rows, other.ids)
    assert type(one.sparse) is type(other.sparse)
    a, b = Collator(schema).collate([one]), Collator(schema).collate([other])
    np.testing.assert_array_equal(a.dense, b.dense)
    np.testing.assert_array_equal(a.lengths, b.lengths)
    np.testing.assert_array_equal(a.values, b.values)


@st.composite
def payloads(draw, schema: ModelSchema) -> tuple[str, bytes]:
    """(method, message) that is right in every point, on either wire, in any of the forms of which a client has the
    choice."""
    rows = draw(st.integers(1, 12))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    longest = draw(st.sampled_from([None, 0, 1, 3]))
    dense = random.standard_normal((rows, schema.dense_dim), dtype=np.float32)
    dense[(random.random(dense.shape) < 0.3) & schema.takes_nan] = np.nan
    count = schema.num_features
    narrow = bool(schema.id_dtype.itemsize == 4)
    on_predictor = draw(st.booleans())
    vast = not narrow and draw(st.booleans())  # ids that int32 does not hold
    shape = (count, rows) if on_predictor else (rows, count)
    lengths = np.ones(shape, np.int32) if longest is None else random.integers(0, longest + 1, shape).astype(np.int32)
    limits = np.broadcast_to(schema.rows[:, None] if on_predictor else schema.rows, shape)
    lows = np.broadcast_to(schema.least[:, None] if on_predictor else schema.least, shape)
    if on_predictor and not vast:
        limits, lows = np.minimum(limits, 1 << 31), np.maximum(lows, -(1 << 31))
    if draw(st.booleans()):  # few of those that are even over all of them have a size that int32 holds
        limits, lows = np.minimum(limits, 3), np.maximum(lows, -3)
    values = random.integers(np.repeat(lows.ravel(), lengths.ravel()), np.repeat(limits.ravel(), lengths.ravel()))
    if on_predictor:
        message = predictor_pb2.PredictionRequest()
        if not schema.dense_dim or draw(st.booleans()):
            message.batch_size = rows
        message.float_features.num_features = schema.dense_dim
        message.float_features.values = dense.tobytes()
        message.id_list_features.num_features = count
        message.id_list_features.lengths = lengths.astype(draw(st.sampled_from(["<i4", "<i4", "<i8"]))).tobytes()
        wide = vast or draw(st.booleans())
        message.id_list_features.values = values.astype(np.int64 if wide else np.int32).tobytes()
        if draw(st.booleans()):  # as TorchRec's client does
            message.id_score_list_features.num_features = 0
            message.embedding_features.num_features = 0
            message.unary_features.num_features = 0
        return predictor.METHOD, message.SerializeToString()
    wide = not narrow or draw(st.booleans())
    own = narsil_pb2.PredictRequest(
        model_name=draw(st.sampled_from(["", "fake"])),
        model_version=draw(st.sampled_from(["", "1"])),
        request_id=draw(st.sampled_from(["", "r1", "naïve"])),
        batch_size=rows,
        dense=dense.tobytes(),
    )
    own.sparse.num_features = count
    own.sparse.id_type = int(wide)
    own.sparse.values = values.astype(np.int64 if wide else np.int32).tobytes()
    if longest is not None or draw(st.booleans()):
        own.sparse.lengths = lengths.tobytes()
    return narsil_v1.METHOD, own.SerializeToString()


def is_common(method: str, body: bytes, schema: ModelSchema) -> bool:
    """Whether a message of ``payloads`` is one that native code has to read itself."""
    if method == narsil_v1.METHOD:
        return "naïve".encode() not in body
    message = predictor_pb2.PredictionRequest.FromString(body)
    rows = message.batch_size or len(message.float_features.values) // (4 * schema.dense_dim)
    return len(message.id_list_features.lengths) == 4 * rows * schema.num_features


@pytest.mark.parametrize("name", SCHEMAS)
@SLOW
@given(data=st.data())
def test_a_right_message_of_the_common_form_is_read_and_gives_the_same_rows(loops, name, data):
    loop = loops[name]
    method, body, common = data.draw(any_payloads(loop.schema))
    expected = loop.portable(method, body)
    found = loop.decode(method, body)
    assert expected is not None
    assert (found is not None) == common
    if found is not None:
        same(found, expected, loop.schema)


@st.composite
def any_payloads(draw, schema: ModelSchema) -> tuple[str, bytes, bool]:
    """(method, message, whether native code has to read it) that is right in every point, on any wire."""
    if draw(st.booleans()):
        request, common = draw(oip_messages.infer_requests(schema))
        return oip_messages.METHOD, request.SerializeToString(), common
    method, body = draw(payloads(schema))
    return method, body, is_common(method, body, schema)


@st.composite
def damage(draw, body: bytes) -> bytes:
    """The message with some bytes changed, cut out, doubled or put in, small numbers and borders more often."""
    out = bytearray(body)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(out)))
        kind = draw(st.sampled_from(["set", "cut", "put", "double", "front"]))
        byte = draw(st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 10, 0x12, 0x1A, 0x22, 0x2A, 0x32, 0x7F, 0x80, 0xFF]))
        if kind == "set" and at < len(out):
            out[at] = byte
        elif kind == "cut":
            del out[at : at + draw(st.integers(1, 8))]
        elif kind == "put":
            out[at:at] = bytes([byte])
        elif kind == "double":
            out += out[at : at + draw(st.integers(1, 40))]
        elif kind == "front":  # a field of any number and wire type, before all others or behind
            field = bytes([draw(st.integers(0, 7)) << 3 | draw(st.sampled_from([0, 2])), draw(st.sampled_from([0, 1]))])
            out = bytearray(field) + out if draw(st.booleans()) else out + bytearray(field)
    return bytes(out)


@pytest.mark.parametrize("name", SCHEMAS)
@settings(SLOW, max_examples=400)
@given(data=st.data())
def test_damaged_messages_are_never_read_otherwise_than_the_portable_codec_reads_them(loops, name, data):
    loop = loops[name]
    method, body, _ = data.draw(any_payloads(loop.schema))
    body = data.draw(damage(body))
    found = loop.decode(method, body)
    if found is None:
        return  # left to the portable codec, whatever it is
    expected = loop.portable(method, body)
    assert expected is not None, "native code took what the portable codec refuses"
    same(found, expected, loop.schema)


@pytest.mark.parametrize("outside", [-1, 1 << 31, (1 << 32) + 1, 1 << 62])
@pytest.mark.parametrize("longest", [1, 2])
def test_an_int64_id_is_not_taken_by_its_low_half(loops, outside, longest):
    lengths, ids = [longest, *[1] * 7], [1] * (7 + longest)
    message = predictor_pb2.PredictionRequest(
        float_features={"num_features": 3, "values": bytes(24)},
        id_list_features={"num_features": 4, "lengths": np.array(lengths, "<i4").tobytes()},
    )
    for last, taken in ((1, True), (outside, False)):
        message.id_list_features.values = np.array([*ids[:-1], last], "<i8").tobytes()
        assert (loops["narrow"].decode(predictor.METHOD, message.SerializeToString()) is not None) == taken


@pytest.mark.parametrize("name", ["narrow", "signed", "wide", "vast"])
@SLOW
@given(data=st.data())
def test_an_id_is_let_in_by_native_code_where_the_portable_codec_lets_it_in(loops, name, data):
    loop = loops[name]
    count = loop.schema.num_features
    borders = [*loop.schema.rows.tolist(), *loop.schema.least.tolist(), 2**31, -(2**31), 2**63 - 1, -(2**63), 0]
    near = st.builds(lambda border, by: border + by, st.sampled_from(borders), st.integers(-2, 1))
    ids = data.draw(st.lists(near, min_size=2 * count, max_size=2 * count))
    kind = data.draw(st.sampled_from(["<i4", "<i8"]))
    ends = np.iinfo(kind)
    ids = np.clip(np.array(ids, object), int(ends.min), int(ends.max)).astype(kind).reshape(2, count)
    bags = data.draw(st.sampled_from([[1] * count, [2] + [1] * (count - 1)]))
    values = np.concatenate([np.repeat(ids[0], bags), ids[1]])
    own = narsil_pb2.PredictRequest(batch_size=2, dense=bytes(8 * loop.schema.dense_dim))
    own.sparse.num_features, own.sparse.id_type, own.sparse.values = count, int(kind == "<i8"), values.tobytes()
    own.sparse.lengths = np.array([*bags, *[1] * count], "<i4").tobytes()
    body = own.SerializeToString()
    right = bool(((ids >= loop.schema.least) & (ids < loop.schema.rows)).all())
    found, expected = loop.decode(narsil_v1.METHOD, body), loop.portable(narsil_v1.METHOD, body)
    assert (found is not None, expected is not None) == (right, right)


@pytest.mark.parametrize("longest", [1, 2])
def test_ids_whose_width_is_told_are_read_in_no_other(loops, longest):
    """narsil.v1 tells it; bytes that would do as int64 are left to the portable codec, which says so."""
    lengths, ids = np.array([longest, *[1] * 7], np.int32), np.ones(7 + longest, np.int64)
    own = narsil_pb2.PredictRequest(batch_size=2, dense=bytes(24))
    own.sparse.num_features, own.sparse.lengths, own.sparse.values = 4, lengths.tobytes(), ids.tobytes()
    for id_type, read in ((0, False), (1, True)):
        own.sparse.id_type = id_type
        assert (loops["narrow"].decode(narsil_v1.METHOD, own.SerializeToString()) is not None) == read


@pytest.mark.parametrize("name", SCHEMAS)
@settings(SLOW, max_examples=600)
@given(data=st.data())
def test_tensors_that_are_spoiled_are_never_read_otherwise_than_the_portable_codec_reads_them(loops, name, data):
    loop = loops[name]
    request, _ = data.draw(oip_messages.infer_requests(loop.schema))
    body = data.draw(oip_messages.spoiled(request)).SerializeToString()
    found = loop.decode(oip_messages.METHOD, body)
    if found is None:
        return
    expected = loop.portable(oip_messages.METHOD, body)
    assert expected is not None, "native code took what the portable codec refuses"
    same(found, expected, loop.schema)


def numbers(field: int, value: int) -> bytes:
    return bytes([field << 3]) + put_uint(1, value)[1:]


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        (predictor.METHOD, b"\x0a\x00"),  # batch_size as a message
        (predictor.METHOD, b"\x22\x00" * 10_001),  # more fields than any message has
        (predictor.METHOD, b"\x22\x02\x08\x01"),  # a feature that the model does not take
        (predictor.METHOD, b"\x0b"),  # a group
        (narsil_v1.METHOD, b"\x22\x00"),  # batch_size as bytes
        (narsil_v1.METHOD, b"\x1a\x01\xff"),  # a request_id that is not UTF-8
        (narsil_v1.METHOD, b"\x0a\x05other"),  # another model
        (narsil_v1.METHOD, b"\x3a\x00"),  # an empty context
        (oip_messages.METHOD, b"\x20\x01"),  # a number
        (oip_messages.METHOD, b"\x22\x00"),  # an empty parameter
        (oip_messages.METHOD, b"\x1a\x01\xff"),  # an id that is not UTF-8
        (oip_messages.METHOD, b"\x0a\x05other"),  # another model
        (oip_messages.METHOD, b"\x2a\x00"),  # an input more than raw contents
        (oip_messages.METHOD, b"\x2a\x07\x0a\x01x\x12\x02\x00\x00\x3a\x00"),  # an input of no known name
        (oip_messages.METHOD, b"\x3a\x00"),  # raw contents more than inputs
        (oip_messages.METHOD, b"\x32\x05\x0a\x03abc"),  # an output that the model has not
        (oip_messages.METHOD, b"\x42\x00"),  # a field that nobody knows
    ],
)
def test_what_is_unusual_is_left_to_the_portable_codec(loops, method, extra):
    right = {
        predictor.METHOD: predictor_pb2.PredictionRequest(
            batch_size=1,
            float_features={"num_features": 3, "values": bytes(12)},
            id_list_features={"num_features": 4, "lengths": b"\1\0\0\0" * 4, "values": bytes(16)},
        ).SerializeToString(),
        narsil_v1.METHOD: build_request(np.zeros((1, 3)), np.zeros((1, 4), int)),
        oip_messages.METHOD: oip_body(one_hot(1)),
    }[method]
    loop = loops["narrow"]
    assert loop.decode(method, right) is not None
    assert loop.decode(method, right + extra) is None
    assert loop.decode(method, extra + right) is None


@pytest.mark.parametrize("body", [b"", b"\x08\x01", b"\xff" * 11, b"\x08" + b"\x80" * 10 + b"\x01"])
def test_what_is_no_request_is_left_alone(loops, body):
    methods = (predictor.METHOD, narsil_v1.METHOD, oip_messages.METHOD)
    for loop, method in itertools.product(loops.values(), methods):
        assert loop.decode(method, body) is None


# Numbers as they come: quiet and other NaN of either sign, infinity, and what is next to it.
BITS = (0, 0x80000000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF, 0xFF800001)


@pytest.mark.parametrize("name", ["narrow", "gaps"])
@SLOW
@given(data=st.data())
def test_a_number_is_let_in_by_native_code_where_the_portable_codec_lets_it_in(loops, name, data):
    loop = loops[name]
    rows = data.draw(st.integers(1, 4))
    bits = data.draw(st.lists(st.sampled_from(BITS), min_size=3 * rows, max_size=3 * rows))
    body = build_request(np.array(bits, np.uint32).view(np.float32).reshape(rows, 3), np.zeros((rows, 4), int))
    sizes = [bit & 0x7FFFFFFF for bit in bits]
    right = all(
        size != 0x7F800000 if at % 3 in loop.schema.nan_columns else size < 0x7F800000 for at, size in enumerate(sizes)
    )
    found, expected = loop.decode(narsil_v1.METHOD, body), loop.portable(narsil_v1.METHOD, body)
    assert (found is not None, expected is not None) == (right, right)


@pytest.mark.parametrize("dense", [np.nan, np.inf, -np.inf])
def test_dense_values_that_are_not_finite_are_left_for_the_portable_codec_to_explain(loops, dense):
    body = build_request(np.full((1, 3), dense), np.zeros((1, 4), int))
    assert loops["narrow"].decode(narsil_v1.METHOD, body) is None


@pytest.mark.parametrize(("row", "feature"), [(0, 0), (11, 3), (5, 1)])
@pytest.mark.parametrize("wrong", [-1, -(2**31), 2**31 - 1, "limit"])
@pytest.mark.parametrize("bags", ["one", "jagged"])
def test_an_id_outside_its_table_is_found_wherever_it_stands(loops, row, feature, wrong, bags):
    loop = loops["narrow"]
    ids = np.zeros((12, 4), dtype=np.int32)
    ids[row, feature] = SCHEMA.rows[feature] if wrong == "limit" else wrong
    lengths = np.ones_like(ids)
    values = ids.ravel()
    if bags == "jagged":
        lengths[0, 0], values = 2, np.concatenate([[0], values]).astype(np.int32)
    own = narsil_pb2.PredictRequest(batch_size=12, dense=bytes(12 * 12))
    own.sparse.num_features, own.sparse.values, own.sparse.lengths = 4, values.tobytes(), lengths.tobytes()
    assert loop.decode(narsil_v1.METHOD, own.SerializeToString()) is None
    values[int(bags == "jagged") + row * 4 + feature] = SCHEMA.rows[feature] - 1
    own.sparse.values = values.tobytes()
    assert loop.decode(narsil_v1.METHOD, own.SerializeToString()) is not None


@pytest.mark.parametrize("name", SCHEMAS)
@SLOW
@given(data=st.data())
def test_fusing_natively_gives_the_tensors_of_the_portable_collator(loops, name, data):
    loop, schema = loops[name], SCHEMAS[name]
    bodies = data.draw(st.lists(any_payloads(schema), min_size=1, max_size=6))
    padding = data.draw(st.integers(0, 9))
    taken = [(loop.take(method, body), method, body) for method, body, _ in bodies]
    kept = [entry for entry in taken if entry[0].decoded]
    try:
        if not kept:
            return
        expected = Collator(schema, padding.__add__).collate([loop.portable(method, body) for _, method, body in kept])
        collator = Collator(schema, padding.__add__)
        collator._dense = np.full(4000, np.nan, np.float32)  # what the batch before has left
        collator._values = np.full(4000, -1, schema.id_dtype)
        found = collator.collate([NativeFeatures(call) for call, _, _ in kept])
        assert (found.rows, found.one_hot) == (expected.rows, expected.one_hot)
        for tensor in ("dense", "lengths", "values"):
            one, other = getattr(found, tensor), getattr(expected, tensor)
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
    finally:
        for call, _, _ in taken:
            call.fail(0, "")
            loop.end(call)


@SLOW
@given(
    count=st.integers(1, 30),  # an answer has to fit the client's window, which nobody reads here meanwhile
    tasks=st.dictionaries(st.text(max_size=6), st.sampled_from([1, 1, 2, 130]), max_size=3),
    batch=st.tuples(st.integers(0, 300), st.integers(0, 1 << 40)),
    times=st.tuples(st.floats(0, 10), st.floats(0, 1e-3)),
    request_id=st.text(st.characters(max_codepoint=127), max_size=200),
    seed=st.integers(0, 1000),
)
def test_answers_are_byte_for_byte_the_portable_codec_s(loops, count, tasks, batch, times, request_id, seed):
    loop = loops["narrow"]
    random = np.random.default_rng(seed)
    dense, ids = random.random((count, 3), np.float32), random.integers(0, 7, (count, 4))
    scores = {
        task: random.standard_normal(count if width == 1 else (count, width), dtype=np.float32)
        for task, width in tasks.items()
    }
    stage = StageTimes(times[0], 0.0, times[1], *batch)
    for method, body in (
        (narsil_v1.METHOD, build_request(dense, ids, request_id=request_id)),
        (predictor.METHOD, predictor_body(dense, ids)),
        (oip_messages.METHOD, oip_request(dense, ids, id=request_id).SerializeToString()),
    ):
        call = loop.take(method, body)
        assert call.decoded
        call.answer_scores(scores, *batch, *times)
        answer = loop.end(call)
        if method == narsil_v1.METHOD:
            asked = narsil_v1.read(body)
            expected = narsil_v1.encode(asked.request_id, "fake", "1", scores, stage)
        elif method == oip_messages.METHOD:
            expected = oip.encode("fake", "1", request_id, scores, ())
        else:
            expected = predictor.encode(scores)
        assert answer.status == 0
        assert answer.messages == [expected]


def predictor_body(dense: np.ndarray, ids: np.ndarray) -> bytes:
    return predictor_pb2.PredictionRequest(
        batch_size=len(dense),
        float_features={"num_features": dense.shape[1], "values": dense.tobytes()},
        id_list_features={
            "num_features": ids.shape[1],
            "lengths": np.ones(ids.size, np.int32).tobytes(),
            "values": np.ascontiguousarray(ids.T, np.int32).tobytes(),
        },
    ).SerializeToString()


def oip_request(dense: np.ndarray, ids: np.ndarray, by_feature: bool = False, **fields: Any) -> Any:
    out = inference_pb2.ModelInferRequest(**fields)
    columns = zip((feature.name for feature in SCHEMA.features), ids.T, strict=True)
    for name, values in [("dense", dense), *(columns if by_feature else [("ids", ids)])]:
        kind = "FP32" if name == "dense" else "INT64"
        out.inputs.add(name=name, datatype=kind, shape=values.shape)
        out.raw_input_contents.append(values.astype("<f4" if name == "dense" else "<i8").tobytes())
    return out


def test_the_outputs_that_are_asked_for_are_answered_in_their_order(loops):
    loop = loops["several"]
    scores = {task: np.full(2, place, np.float32) for place, task in enumerate(SEVERAL.tasks)}
    asked: tuple[str, ...]
    for asked in (("c", "a"), ("b",), ("a", "b", "c"), ()):
        request = oip_request(np.zeros((2, 3)), np.zeros((2, 4), int))
        for task in asked:
            request.outputs.add(name=task)
        call = loop.take(oip_messages.METHOD, request.SerializeToString())
        assert call.decoded
        call.answer_scores(scores, 1, 2, 0.0, 0.0)
        assert loop.end(call).messages == [oip.encode("fake", "1", "", scores, asked)]
    request.outputs.add(name="b")
    call = loop.take(oip_messages.METHOD, request.SerializeToString())
    with pytest.raises(ValueError, match="no scores of the task b"):
        call.answer_scores({"a": scores["a"]}, 1, 2, 0.0, 0.0)
    call.fail(0, "")
    loop.end(call)


def test_ids_of_one_feature_are_not_taken_for_another_s(loops):
    """Lengths that add up over all features, and not for each."""
    loop = loops["narrow"]
    for counts, read in (((2, 2), True), ((1, 3), False), ((3, 1), False)):
        request = oip_request(np.zeros((2, 3)), np.zeros((2, 4), int), by_feature=True)
        for place, count in zip((1, 2), counts, strict=True):
            name = request.inputs[place].name
            request.inputs[place].name, request.inputs[place].shape[:] = name + ".values", [count]
            request.raw_input_contents[place] = bytes(8 * count)
            request.inputs.add(name=name + ".lengths", datatype="INT32", shape=[2])
            request.raw_input_contents.append(np.array([2, 0], "<i4").tobytes())
        body = request.SerializeToString()
        assert (loop.decode(oip_messages.METHOD, body) is not None) == read
        assert (loop.portable(oip_messages.METHOD, body) is not None) == read


def reshaped(request: Any, place: int, *sizes: int) -> None:
    request.inputs[place].shape[:] = sizes


def renamed(request: Any, place: int, name: str) -> None:
    request.inputs[place].name = name


def added(request: Any, name: str, *sizes: int) -> None:
    request.inputs.add(name=name, datatype="INT64", shape=sizes)
    request.raw_input_contents.append(bytes(8 * int(np.prod(sizes))))


FOUR = [feature.name for feature in SCHEMA.features]


@pytest.mark.parametrize(
    "change",
    [
        lambda r: reshaped(r, 1, 4, 2**62 + 1),  # 4 numbers, in 64 bits alone
        lambda r: reshaped(r, 1, 4, 1, 1),
        lambda r: reshaped(r, 1),
        lambda r: reshaped(r, 1, -4, -1),
        lambda r: reshaped(r, 0, 3, 4),
        lambda r: reshaped(r, 0, 12),
        lambda r: added(r, "ids", 4, 4),
        lambda r: added(r, "ids.values", 0),
        lambda r: added(r, FOUR[0] + ".values", 4),
        lambda r: added(r, FOUR[0] + ".lengths", 4),
        lambda r: added(r, FOUR[0] + ".weights", 4),
        lambda r: renamed(r, 1, FOUR[0] + ".values"),
        lambda r: renamed(r, 1, FOUR[1]),
        lambda r: renamed(r, 0, "other"),
    ],
)
def test_tensors_that_do_not_go_together_are_left_to_the_portable_codec_which_refuses_them(loops, change):
    loop = loops["narrow"]
    request = oip_request(np.zeros((4, 3)), np.zeros((4, 4), int), by_feature=True)
    assert loop.decode(oip_messages.METHOD, request.SerializeToString()) is not None
    change(request)
    assert loop.decode(oip_messages.METHOD, request.SerializeToString()) is None
    assert loop.portable(oip_messages.METHOD, request.SerializeToString()) is None


@pytest.mark.parametrize("values", ["ids", "id_list_features", "id_score_list_features"])
@pytest.mark.parametrize("lengths", ["ids", "id_list_features", "id_score_list_features"])
def test_values_and_lengths_of_two_forms_do_not_go_together(loops, values, lengths):
    loop = loops["narrow"]
    request = oip_request(np.zeros((4, 3)), np.zeros((4, 4), int))
    del request.inputs[1], request.raw_input_contents[1]
    added(request, values + ".values", 0)
    added(request, lengths + ".lengths", 4, 4)  # as many rows as features, so that both layouts fit
    read = values == lengths
    assert (loop.decode(oip_messages.METHOD, request.SerializeToString()) is not None) == read
    assert (loop.portable(oip_messages.METHOD, request.SerializeToString()) is not None) == read


def test_an_output_that_is_asked_for_twice_is_left_to_the_portable_codec_which_refuses_it(loops):
    loop = loops["several"]
    for asked, read in (("ab", True), ("aa", False)):
        request = oip_request(np.zeros((1, 3)), np.zeros((1, 4), int))
        for task in asked:
            request.outputs.add(name=task)
        assert (loop.decode(oip_messages.METHOD, request.SerializeToString()) is not None) == read
        assert (loop.portable(oip_messages.METHOD, request.SerializeToString()) is not None) == read


@pytest.mark.parametrize(("last", "read"), [(2**31 - 1, True), (-1, False)])
def test_ids_of_32_bits_keep_their_sign_beside_ids_of_64(loops, last, read):
    loop = loops["wide"]
    request = inference_pb2.ModelInferRequest()
    for name, kind, values in (
        ("dense", "FP32", np.zeros((1, 2), "<f4")),
        ("small", "INT64", np.zeros(1, "<i8")),
        ("vast", "INT32", np.array([last], "<i4")),
    ):
        request.inputs.add(name=name, datatype=kind, shape=values.shape)
        request.raw_input_contents.append(values.tobytes())
    assert (loop.decode(oip_messages.METHOD, request.SerializeToString()) is not None) == read
    assert (loop.portable(oip_messages.METHOD, request.SerializeToString()) is not None) == read


@pytest.mark.parametrize(("shape", "read"), [([2, 1], True), ([2], False), ([2, 1, 1], False)])
def test_one_dense_column_is_a_matrix_too(tmp_path, shape, read):
    loop = Loop(ModelSchema(dense_dim=1, features=(Feature("a", "t", rows=9, dim=4),)), str(tmp_path / "plane"))
    request = inference_pb2.ModelInferRequest()
    request.inputs.add(name="dense", datatype="FP32", shape=shape)
    request.inputs.add(name="a", datatype="INT64", shape=[2])
    request.raw_input_contents.extend([bytes(8), bytes(16)])
    assert (loop.decode(oip_messages.METHOD, request.SerializeToString()) is not None) == read
    assert (loop.portable(oip_messages.METHOD, request.SerializeToString()) is not None) == read
    loop.close()


def test_a_call_says_what_it_holds_beside_its_message(loops):
    loop, ids = loops["narrow"], np.zeros((5, 4), int)
    for by_feature, copied in ((False, 0), (True, 5 * 4 * 8)):
        body = oip_request(np.zeros((5, 3)), ids, by_feature).SerializeToString()
        call = loop.take(oip_messages.METHOD, body)
        assert call.decoded
        assert call.size == len(body) + copied
        call.fail(0, "")
        loop.end(call)


@pytest.mark.parametrize(
    "name", ["dense", "ids", "a.values", "a.lengths", "a.weights", "id_list_features.values", "b.values"]
)
def test_of_features_that_are_named_as_other_tensors_are_the_portable_codec_reads_the_request(tmp_path, name):
    features = tuple(Feature(each, "t", rows=9, dim=4) for each in ("a", name))
    loop = Loop(ModelSchema(dense_dim=0, features=features), str(tmp_path / "plane"))
    request = inference_pb2.ModelInferRequest()
    for feature in features:
        request.inputs.add(name=feature.name, datatype="INT64", shape=[1])
        request.raw_input_contents.append(bytes(8))
    assert loop.decode(oip_messages.METHOD, request.SerializeToString()) is None
    loop.close()


def test_a_message_of_too_many_fields_is_left_to_the_portable_codec_which_refuses_it(loops):
    request = oip_request(np.zeros((1, 3)), np.zeros((1, 4), int))
    body, loop = request.SerializeToString(), loops["narrow"]
    assert loop.decode(oip_messages.METHOD, body) is not None
    empty = b"\x1a\x00" * 10_000  # sizes, none of them
    first = request.inputs[0].SerializeToString()
    more = put_len(5, first + empty) + b"".join(put_len(5, each.SerializeToString()) for each in request.inputs[1:])
    more += b"".join(put_len(7, raw) for raw in request.raw_input_contents)
    assert loop.decode(oip_messages.METHOD, more) is None
    assert loop.portable(oip_messages.METHOD, more) is None


def test_a_message_s_arrays_outlive_its_call(loops):
    loop = loops["narrow"]
    ids = np.arange(240).reshape(60, 4) % 7
    call = loop.take(narsil_v1.METHOD, build_request(np.ones((60, 3)), ids))
    call.fail(0, "")
    loop.end(call)
    dense, values, lengths = call.arrays()  # made after the call has ended
    del call
    for _ in range(20):  # what would lie there now
        loop.decode(narsil_v1.METHOD, build_request(np.zeros((60, 3)), np.zeros((60, 4), int)))
    assert (dense == 1).all()
    np.testing.assert_array_equal(values.reshape(60, 4), ids)
    assert lengths is None
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 1


def test_ids_that_were_laid_out_anew_outlive_their_call(loops):
    loop, ids = loops["narrow"], np.arange(240).reshape(60, 4) % 7
    call = loop.take(oip_messages.METHOD, oip_request(np.ones((60, 3)), ids, by_feature=True).SerializeToString())
    call.fail(0, "")
    loop.end(call)
    _, values, _ = call.arrays()
    del call
    for _ in range(20):
        other = oip_request(np.ones((60, 3)), np.zeros((60, 4)), by_feature=True)
        loop.decode(oip_messages.METHOD, other.SerializeToString())
    np.testing.assert_array_equal(values.reshape(4, 60), ids.T)


def test_collate_refuses_buffers_that_the_batch_would_overrun(loops):
    loop = loops["narrow"]
    call = loop.take(narsil_v1.METHOD, build_request(np.zeros((5, 3)), np.zeros((5, 4), int)))
    undecoded = loop.take(narsil_v1.METHOD, b"\xff")
    foreign = loops["one"].take(narsil_v1.METHOD, build_request(np.zeros((5, 0)), np.zeros((5, 1), int)))
    dense, values, lengths = np.empty(15, np.float32), np.empty(20, np.int32), np.empty(20, np.int32)
    collate([call], 5, dense, values, None)
    cases: list[tuple[Any, str]] = [
        (([], 5, dense, values, None), "no calls"),
        (([call], 4, dense, values, None), "fewer rows"),
        (([call], 6, dense, values, None), "dense is too short"),
        (([call], 5, dense, values[:19], None), "values is too short"),
        (([call], 5, dense, values.astype(np.int64), None), "another type"),
        (([call], 5, dense, values.astype(np.uint32), None), "another type"),
        (([call], 5, dense, values, lengths), "lengths are for jagged"),
        (([call], 5, dense, values[::-1], None), "contiguous"),
        (([call, undecoded], 10, dense, values, None), "not decoded"),
        (([call, foreign], 10, dense, values, None), "different models"),
        (([call], 2**61, dense, values, None), "too short"),
        (([call], -1, dense, values, None), "fewer rows"),
    ]
    for wrong, why in cases:
        with pytest.raises(ValueError, match=why):
            collate(*wrong)
    dense.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        collate([call], 5, dense, values, None)
    for one in (call, undecoded):
        one.fail(0, "")
        loop.end(one)
    foreign.fail(0, "")
    loops["one"].end(foreign)


def test_a_call_is_answered_once(loops):
    loop = loops["narrow"]
    call = loop.take(narsil_v1.METHOD, build_request(np.zeros((1, 3)), np.zeros((1, 4), int)))
    call.fail(5, "the first")
    call.fail(6, "the second")
    call.answer(b"the third")
    call.answer_scores({}, 1, 1, 0.0, 0.0)
    answer = loop.end(call)
    assert (answer.status, answer.detail, answer.messages) == (5, "the first", [])


def test_scores_of_another_type_or_layout_are_answered_right_and_of_another_shape_refused(loops):
    loop = loops["narrow"]
    call = loop.take(narsil_v1.METHOD, build_request(np.zeros((3, 3)), np.zeros((3, 4), int)))
    for scores in (np.zeros((3, 1, 1), np.float32), np.float32(1)):
        with pytest.raises(ValueError, match="float32"):
            call.answer_scores({"default": scores}, 1, 3, 0.0, 0.0)
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    call.answer_scores({"default": np.arange(6, dtype=np.float64)[::2], "wide": turned}, 1, 3, 0.0, 0.0)
    reply = narsil_pb2.PredictResponse.FromString(loop.end(call).messages[0])
    assert np.frombuffer(reply.scores[0].values, np.float32).tolist() == [0.0, 2.0, 4.0]
    assert np.frombuffer(reply.scores[1].values, np.float32).tolist() == [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    assert [scores.width for scores in reply.scores] == [0, 2]


def test_one_hot_and_jagged_company(loops):
    """The kinds that the properties compare are in fact both there."""
    loop = loops["narrow"]
    assert isinstance(
        loop.decode(narsil_v1.METHOD, build_request(np.zeros((1, 3)), np.zeros((1, 4), int))).sparse, OneHot
    )
    own = narsil_pb2.PredictRequest(batch_size=1, dense=bytes(12))
    own.sparse.num_features, own.sparse.lengths = 4, bytes(16)
    found = loop.decode(narsil_v1.METHOD, own.SerializeToString())
    assert isinstance(found.sparse, Jagged)
    assert found.ids == 0
