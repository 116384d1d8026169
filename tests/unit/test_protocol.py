"""docs/protocol.md against the code: its bytes are read as it says, and what it quotes is what clients are told."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from narsil.artifacts.schema import Feature, ModelSchema
from narsil.backends.fake import FakeBackend, FakeBehaviour
from narsil.catalog.catalog import EMPTY, Catalog
from narsil.catalog.control import ModelControl
from narsil.catalog.manager import ModelManager
from narsil.clock import FakeClock
from narsil.dataflow import Batch, Features, OneHot, Request, Scores
from narsil.engine.collate import Collator
from narsil.engine.queue import QueueLimits, RequestQueue
from narsil.engine.scheduler import BatchPolicy
from narsil.engine.served_model import ServedModel
from narsil.errors import RequestError
from narsil.packaging.dlrm import DlrmConfig
from narsil.transports import native
from narsil.transports.codec import narsil_v1, predictor
from narsil.transports.endpoints import ENDPOINTS, Metadata
from tests.documents import codes, read, rows_of, sections
from tests.messages import narsil_pb2, predictor_pb2
from tests.support import PATIENCE_S, SCHEMA, Reply, engine_with, fake_model, one_hot, request

TEXT = read("docs/protocol.md")
CHAPTERS = sections(TEXT, 2)

# The model of the page's examples: D = 1, features a and b.
EXAMPLE = ModelSchema(1, (Feature("a", "t_a", 10, 8), Feature("b", "t_b", 10, 8)))
MODEL = fake_model(schema=EXAMPLE, name="dlrm")


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def ints(*values: int, kind: str = "<i4") -> bytes:
    return np.array(values, kind).tobytes()


# --- the bytes of the examples


def examples() -> list[tuple[int, bytes]]:
    """(stated size, bytes) of every example, in the order of the page."""
    found = []
    for size, block in re.findall(r"(\d+) bytes[^\n]*:\n\n```text\n(.*?)```", TEXT, re.DOTALL):
        lines = (re.match(r"\s*((?:[0-9a-f]{2} ?)+)(?:  |$)", line) for line in block.splitlines())
        found.append((int(size), bytes.fromhex("".join(line[1] for line in lines if line))))
    return found


def test_every_example_has_the_size_that_is_stated() -> None:
    assert [size for size, _ in examples()] == [len(body) for _, body in examples()]
    assert len(examples()) == 5


def test_the_example_requests_read_as_the_rows_of_the_page() -> None:
    torchrec, _, plain, _, shared = (body for _, body in examples())
    for found in (
        predictor.decode(torchrec, EXAMPLE, MODEL.limits),
        narsil_v1.decode(plain, EXAMPLE, MODEL.limits),
    ):
        assert bags_of(found) == {"a": [[3], [5, 7]], "b": [[9], []]}
        assert found.dense.tolist() == [[0.5], [2.0]]
    context = narsil_v1.decode(shared, EXAMPLE, MODEL.limits)
    assert bags_of(context) == {"a": [[3], [5]], "b": [[9, 4], [9, 4]]}


def bags_of(rows: Features) -> dict[str, list[list[int]]]:
    batch = Collator(EXAMPLE).collate([rows])
    bags = [bag.tolist() for bag in np.split(batch.values, np.cumsum(batch.lengths)[:-1])]
    return {"a": bags[: rows.rows], "b": bags[rows.rows :]}


def test_the_example_answers_say_what_stands_beside_them() -> None:
    _, torchrec, _, ours, _ = (body for _, body in examples())
    answer = predictor_pb2.PredictionResponse.FromString(torchrec)
    assert list(answer.predictions["default"].data) == [0.25, 0.75]
    found = narsil_pb2.PredictResponse.FromString(ours)
    assert (found.model_name, found.model_version) == ("dlrm", "1")
    assert [(score.task, score.values) for score in found.scores] == [("default", floats(0.25, 0.75))]
    about = found.provenance
    assert (about.batch_requests, about.batch_rows, about.queue_us, about.execute_us) == (1, 2, 40, 600)


# --- the fields


def fields_told(text: str) -> set[tuple[str, int]]:
    """(field, number) wherever the text gives both: in a table's row, or as `field` (number, ..)."""
    found = {(name, int(number)) for name, number in re.findall(r"`(?:\w+\.)?(\w+)`\s+\((\d+)[,;)]", text)}
    for row in rows_of(text):
        names, numbers = codes(row[0]), [int(number) for number in re.findall(r"\b\d+\b", row[1].split("|")[0])]
        found |= set(zip(names, numbers, strict=False))
    return found


@pytest.mark.parametrize(
    ("chapters", "messages"),
    [
        (["predictor.Predictor/Predict"], predictor_pb2),
        (["narsil.v1.Inference/Predict", "narsil.v1.Inference/GetModel"], narsil_pb2),
    ],
)
def test_every_field_has_the_number_that_is_stated(chapters: list[str], messages: Any) -> None:
    text = "".join(CHAPTERS[chapter] for chapter in chapters)
    fields = {(field.name, field.number) for message in vars(messages).values() for field in message.DESCRIPTOR.fields}
    assert fields_told(text) - fields == set(), "docs/protocol.md gives these fields numbers that they do not have"
    missing = fields - fields_told(text)
    assert missing == set(), "docs/protocol.md does not tell of these fields"


# --- the texts


def torchrec(**changes: Any) -> str:
    """What TorchRec's wire says of the example's request with these fields of its parts changed."""
    (_, body), *_ = examples()
    message = predictor_pb2.PredictionRequest.FromString(body)
    for path, value in changes.items():
        part, _, field = path.partition("__")
        setattr(getattr(message, part), field, value) if field else setattr(message, part, value)
    return told(lambda: predictor.decode(message.SerializeToString(), EXAMPLE, MODEL.limits))


def ours(**changes: Any) -> str:
    """What Narsil's wire says of a request with these fields of ``sparse``, and the example's dense values."""
    sparse = narsil_pb2.SparseFeatures(**changes)
    message = narsil_pb2.PredictRequest(batch_size=2, dense=floats(0.5, 2.0), sparse=sparse)
    return told(lambda: narsil_v1.decode(message.SerializeToString(), EXAMPLE, MODEL.limits))


def two_numbers_of_rows() -> str:
    """For a model without dense columns."""
    message = predictor_pb2.PredictionRequest()
    message.id_list_features.num_features = 2
    message.id_list_features.lengths, message.id_list_features.values = ints(1, 2, 1, 0, kind="<i8"), ints(3, 5, 7, 9)
    body = message.SerializeToString()
    return told(lambda: predictor.decode(body, dataclasses.replace(EXAMPLE, dense_dim=0), MODEL.limits))


def told(act: Callable[[], object]) -> str:
    with pytest.raises(RequestError) as caught:
        act()
    return str(caught.value)


def demo_id() -> str:
    """An id outside of its table, for the model that `narsil package dlrm` makes."""
    schema = DlrmConfig().schema
    rows = one_hot(8, 0, schema)
    assert isinstance(rows.sparse, OneHot)
    rows.sparse.ids[3, 7] = 100_000
    batch = Collator(schema).collate([rows])
    message = predictor_pb2.PredictionRequest(batch_size=8)
    message.float_features.num_features = schema.dense_dim
    message.float_features.values = batch.dense.tobytes()
    message.id_list_features.num_features = schema.num_features
    message.id_list_features.lengths = batch.lengths.tobytes()
    message.id_list_features.values = batch.values.astype("<i4").tobytes()
    return told(lambda: predictor.decode(message.SerializeToString(), schema, MODEL.limits))


def full_queue() -> str:
    schema = DlrmConfig().schema
    queue, rows = RequestQueue(QueueLimits()), one_hot(100, 0, schema)

    def add() -> None:
        queue.add(Request(MODEL, rows, Reply(), 0.0, size=23_000))

    for _ in range(1024):
        add()
    return told(add)


def end_of(one: Request) -> str:
    """The text of the error that it ends with."""
    reply: Any = one.reply
    return str(reply.wait().error)


def ended(behaviour: FakeBehaviour | None = None, *, clock: FakeClock | None = None, **given: Any) -> str:
    """What a request of two rows is told, of an engine that runs one row at a time."""
    with engine_with(behaviour, clock=clock, policy=BatchPolicy(max_rows=1)) as engine:
        one = request(2, model=engine.model, **given)
        engine.submit(one)
        return end_of(one)


def expired() -> str:
    return ended(clock=FakeClock(0.0123), deadline=0.01)


def expired_between() -> str:
    clock = FakeClock()

    def passes(batch: object) -> bool:
        clock.advance(1.0)
        return False

    return ended(FakeBehaviour(fail_if=passes), clock=clock, deadline=0.5)


def cancelled() -> str:
    gone = Reply()
    gone.cancelled = True
    with engine_with() as engine:
        one = Request(engine.model, one_hot(1), gone, 0.0)
        engine.submit(one)
        return end_of(one)


def draining() -> str:
    with engine_with() as engine:
        engine.drain(PATIENCE_S)
        return told(lambda: engine.submit(request(model=engine.model)))


def failed() -> str:
    return ended(FakeBehaviour(fail_if=lambda batch: True))


def scored_nan() -> str:
    class Diverging(FakeBackend):
        def run(self, batch: Batch) -> Scores:
            return {"default": np.array([0.5, np.nan], np.float32)}

    model = ServedModel("dlrm", "1", [Diverging(SCHEMA)])
    with engine_with(model=model) as engine:
        one = request(2, model=model)
        engine.submit(one)
        return end_of(one)


def defect() -> str:
    class Call:
        def fail(self, status: int, message: str) -> None:
            self.said = message

    call: Any = Call()
    native._fail_unexpected(call)
    return str(call.said)


def two_names() -> str:
    (endpoint,) = (each for each in ENDPOINTS if each.method == narsil_v1.METHOD)
    body = narsil_pb2.PredictRequest(model_name="a").SerializeToString()
    assert endpoint.wire is not None
    wire = endpoint.wire
    return told(lambda: wire.decode(body, Metadata("b"), Catalog([MODEL])))


def no_control() -> str:
    with engine_with() as engine:
        control = ModelControl(Path(), ModelManager(engine), lambda folder, held: (MODEL, []))
        return told(lambda: control.load("ads"))


# As the page has them, in its order: what is quoted, how to be told so.
TOLD: dict[str, Callable[[], str]] = {
    "the message asks for model 'a' and the metadata narsil-model for 'b'; give one of them": two_names,
    "batch_size is left out, and id_list_features.lengths: 32 bytes may be int32 of 4 rows or int64 of 2; send "
    "batch_size": two_numbers_of_rows,
    "feature cat_3, row 7: id 100000 is outside its table t_cat_3; ids are 0 to 99999": demo_id,
    "model 'ads' is not served here; this server serves 'dlrm'": lambda: told(lambda: Catalog([MODEL]).find("ads")),
    "models are not loaded and unloaded by clients here; start the server with --repository and --model-control "
    "explicit": no_control,
    "version '9' of dlrm is not served here; '1' is": lambda: told(lambda: Catalog([MODEL]).find("", "9")),
    "the queue is full: 1024 of 1024 requests, 102400 of 131072 rows, 2662400 of 16777216 ids, 23552000 of 536870912 "
    "bytes; this request has 100 rows. Retry with backoff": full_queue,
    "the deadline passed after 12.3 ms in the queue; it was not run": expired,
    "the deadline passed between the request's forwards; the others were given up": expired_between,
    "the client cancelled the request; it was not run": cancelled,
    "the server is shutting down; retry on another one": draining,
    "this server serves no model now; retry on another one, or later": lambda: told(EMPTY.find),
    "the model's forward failed on this request (RuntimeError); the server's log says why": failed,
    "task default: the model scored row 1 as nan, which is no answer; look at this row's values and at the model's "
    "weights": scored_nan,
    "internal error; the server's log says why": defect,
    "batch_size is 200000; it must be 1 to 131072 rows (--max-request-rows)": lambda: torchrec(batch_size=200_000),
    "batch_size is left out, and float_features.values: 6 bytes are no whole number of rows of 4 bytes; send "
    "batch_size": lambda: torchrec(batch_size=0, float_features__values=bytes(6)),
    "float_features.num_features is 3; the model takes 1 dense features": lambda: torchrec(
        float_features__num_features=3
    ),
    "float_features.values: 4 bytes for 2 rows; the model takes 1 float32 a row, 8 bytes": lambda: torchrec(
        float_features__values=floats(0.5)
    ),
    "float_features.values: row 0, column 0 is inf; values must be finite": lambda: torchrec(
        float_features__values=floats(np.inf, 2.0)
    ),
    "float_features.values: row 0, column 0 is nan; values must be finite: --allow-nan serves a model that takes NaN "
    "for a missing value": lambda: torchrec(float_features__values=floats(np.nan, 2.0)),
    "id_list_features.lengths: 4 bytes for 2 features x 2 rows; expected 16 bytes of int32, key-major": lambda: (
        torchrec(id_list_features__lengths=ints(1))
    ),
    "id_list_features: feature a, row 0: length -1 is negative": lambda: torchrec(
        id_list_features__lengths=ints(-1, 2, 1, 0)
    ),
    "id_list_features: feature a, row 0: length 4294967297 is no int32": lambda: torchrec(
        id_list_features__lengths=ints(2**32 + 1, 2, 1, 0, kind="<i8")
    ),
    "id_list_features: lengths add up to 4 ids and values holds 2 int32": lambda: torchrec(
        id_list_features__values=ints(3, 5)
    ),
    "id_list_features: 4 weights given, but no table of this model takes weights; send ids alone": lambda: torchrec(
        id_list_features__weights=floats(1, 1, 1, 1)
    ),
    "sparse.feature_names: the model has no feature 'x'": lambda: ours(feature_names=["x"], values=ints(3, 9)),
    "sparse.values: 32 bytes for 2 rows x 2 features; without lengths each bag holds one int32, 16 bytes in all": (
        lambda: ours(num_features=2, values=ints(*range(8)))
    ),
    "not a valid protobuf message: at byte 2: a varint does not end": lambda: told(
        lambda: predictor.decode(b"\x08\xff", EXAMPLE, MODEL.limits)
    ),
}


def quoted() -> list[str]:
    """Every text that the page says a client is told, but those that it says differ: tests/conformance has these."""
    blocks = re.findall(r"\n\n((?: {4}\S.*\n)+)", TEXT)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    cells = [code for row in rows_of(CHAPTERS["Errors"]) for code in codes(row[2])]
    conflict = [code for code in codes(CHAPTERS["Which model"]) if "; " in code]
    return [*conflict, *lines[:1], *cells, *lines[1:]]


def test_the_page_quotes_what_these_tests_know_and_nothing_else() -> None:
    assert sorted(quoted()) == sorted(TOLD)


@pytest.mark.parametrize("text", TOLD)
def test_a_quoted_text_is_what_a_client_is_told(text: str) -> None:
    assert TOLD[text]() == text


def test_every_code_of_the_table_is_there_with_its_number() -> None:
    from narsil.errors import STATUS

    told_codes = {int(number) for row in rows_of(CHAPTERS["Errors"]) for number in re.findall(r"\((\d+)\)", row[0])}
    assert told_codes == {
        *(codes.grpc for codes in STATUS.values()),
        12,
    }  # and UNIMPLEMENTED, which no request ends with


def test_every_status_of_http_is_in_its_table_with_the_code_of_grpc_beside_it() -> None:
    from narsil.errors import STATUS

    rows = {int(row[0]): row[1] for row in rows_of(CHAPTERS["Open Inference Protocol over HTTP"]) if row[0].isdigit()}
    ours = {405, 408, 415, 431}  # of HTTP alone
    assert set(rows) == ours | {codes.http for codes in STATUS.values()} - {499}  # which nobody hears
    for name, number in (("INVALID_ARGUMENT", 3), ("NOT_FOUND", 5), ("DEADLINE_EXCEEDED", 4), ("UNAVAILABLE", 14)):
        (status,) = {codes.http for codes in STATUS.values() if codes.grpc == number}
        assert name in rows[status]
