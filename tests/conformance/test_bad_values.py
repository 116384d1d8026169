"""One thing is wrong with a request: its weights, its vectors, its widths, its ids, or one of its groups. Either
transport refuses it in the same sentence, which names what is wrong and where; good requests beside it are scored.
Hypothesis says what is wrong, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narsil.artifacts.schema import Feature, ModelSchema
from narsil.dataflow import Features, Jagged, RequestLimits
from narsil.errors import InvalidRequest
from narsil.extension import AVAILABLE
from narsil.transports.codec import narsil_v1, predictor
from tests.messages import Message, narsil_pb2, predictor_pb2
from tests.support import PATIENCE_S, engine_with, grpc_transport, scores_alone, unary

KINDS = ["grpcio", *(["native"] if AVAILABLE else [])]
LIMITS = RequestLimits(max_rows=100, max_ids=1000)
MOST, LEAST = 2**40, -(2**40)  # of ids that a model searches for
# Of one group: what native code decodes too.
PLAIN = ModelSchema(
    3,
    (Feature("managed", "t_managed", MOST, 4, least=LEAST), Feature("small", "t_small", 9, 4)),
    nan_columns=(1,),
)
GROUPED = ModelSchema(
    3,
    (
        Feature("managed", "t_managed", MOST, 4, group="id_list_features", least=LEAST),
        Feature("small", "t_small", 9, 4, group="id_list_features"),
        Feature("w", "t_w", 30, 4, weighted=True, group="id_score_list_features"),
        Feature("one", "t_one", 5, 4, group="unary_features"),
    ),
    matrices=(("float_features", 1), ("embedding_features", 2)),
)
WEIGHTED = ModelSchema(1, (Feature("a", "t_a", 10, 4, weighted=True), Feature("b", "t_b", 20, 4)))
Fault = Callable[[Message, st.DataObject], str]  # changes a message; what the refusal says
Asked = tuple[str, bytes, Callable[[bytes], Features]]  # method, message, and what decodes it


class Servers:
    """A fake model behind either transport."""

    def __init__(self, schema: ModelSchema, stack: ExitStack) -> None:
        self.schema = schema
        self.channels = {}
        for kind in KINDS:
            engine = stack.enter_context(engine_with(schema=schema))
            _, address, _ = stack.enter_context(grpc_transport(engine, LIMITS, kind))
            self.channels[kind] = stack.enter_context(grpc.insecure_channel(address))

    def check(self, bad: Asked, says: str, good: Asked) -> None:
        """The bad request is refused so, in the same words everywhere; the good one behind it is scored."""
        method, body, decode = bad
        with pytest.raises(InvalidRequest) as portable:
            decode(body)
        text = str(portable.value)
        assert says in text
        expected = scores_alone(good[2](good[1]), self.schema)
        for kind, channel in self.channels.items():
            future = unary(channel, method).future(body, timeout=PATIENCE_S)
            beside = unary(channel, good[0])(good[1], timeout=PATIENCE_S)
            assert (future.code(), future.details()) == (grpc.StatusCode.INVALID_ARGUMENT, text), kind
            np.testing.assert_allclose(scores_in(good[0], beside), expected, rtol=1e-6)


def scores_in(method: str, body: bytes) -> Any:
    if method == predictor.METHOD:
        return np.array(predictor_pb2.PredictionResponse.FromString(body).predictions["default"].data, np.float32)
    return np.frombuffer(narsil_pb2.PredictResponse.FromString(body).scores[0].values, "<f4")


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Servers]]:
    with ExitStack() as stack:
        schemas = {"plain": PLAIN, "grouped": GROUPED, "weighted": WEIGHTED}
        yield {name: Servers(schema, stack) for name, schema in schemas.items()}


def right(schema: ModelSchema, seed: int, rows: int) -> Features:
    """Rows with an id in every bag, so that there is something to break."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 4, (schema.num_features, rows)).astype(np.int32)
    counts = lengths.sum(axis=1)
    ids = random.integers(np.repeat(schema.least, counts), np.repeat(schema.rows, counts))
    bags = Jagged.laid_out(ids.astype(np.int64), lengths)
    weights = np.where(np.repeat([each.weighted for each in schema.features], counts), random.random(len(ids)), 1)
    sparse = Jagged(bags.values, bags.starts, bags.lengths, weights.astype(np.float32) if schema.weighted else None)
    return Features(rows, random.random((rows, schema.dense_dim), np.float32), sparse)


GROUPS = {2: "float_features", 5: "embedding_features", 3: "id_list_features", 4: "id_score_list_features"}
GROUPS[6] = "unary_features"


def places_of(bags: Jagged, order: Any) -> Any:
    """Where the ids of bags stand, bag by bag in an order of flat numbers of (T, B)."""
    starts, lengths = bags.starts.ravel()[order], bags.lengths.ravel()[order]
    return np.concatenate([np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)])


def torchrec(schema: ModelSchema, features: Features) -> Message:
    """As predictor.proto has it, each group in its place, ids as int64."""
    message = predictor_pb2.PredictionRequest(batch_size=features.rows)
    for number, columns in predictor.columns_of(schema).items():
        group = getattr(message, GROUPS[number])
        group.num_features, group.values = len(columns), features.dense[:, columns].tobytes()
    bags = features.sparse.jagged()
    for number, positions in predictor.features_of(schema).items():
        group = getattr(message, GROUPS[number])
        places = places_of(bags, np.arange(bags.lengths.size).reshape(bags.lengths.shape)[positions].ravel())
        group.num_features, group.lengths = len(positions), bags.lengths[positions].astype("<i4").tobytes()
        group.values = bags.values[places].astype("<i8").tobytes()
        if bags.weights is not None and schema.features[positions[0]].weighted:
            group.weights = bags.weights[places].tobytes()
    return message


def by_rows(features: Features) -> Message:
    """As narsil.proto has it, ids as int64."""
    bags = features.sparse.jagged()
    places = places_of(bags, np.arange(bags.lengths.size).reshape(bags.lengths.shape).T.ravel())
    message = narsil_pb2.PredictRequest(batch_size=features.rows, dense=features.dense.tobytes())
    sparse = message.sparse
    sparse.num_features, sparse.id_type = len(bags.lengths), 1
    sparse.values, sparse.lengths = bags.values[places].astype("<i8").tobytes(), bags.lengths.T.tobytes()
    sparse.weights = bags.weights_or_ones()[places].tobytes()
    return message


def numbers(data: bytes, kind: str) -> Any:
    return np.frombuffer(data, kind).copy()


def place(data: st.DataObject, count: int) -> int:
    return data.draw(st.integers(0, count - 1))


# -- weights


def _weights_of_wrong_count(group: Any, data: st.DataObject, name: str) -> str:
    ids = len(group.weights) // 4
    count = data.draw(st.integers(1, 2 * ids + 3).filter(lambda count: count != ids))
    group.weights = np.ones(count, np.float32).tobytes()
    return f"{name}: {count} weights for {ids} ids; there must be one per id"


def _a_weight_that_is_no_number(group: Any, data: st.DataObject, name: str) -> str:
    weights = numbers(group.weights, "<f4")
    at, wrong = place(data, len(weights)), data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    weights[at] = wrong
    group.weights = weights.tobytes()
    return f"{name}: weight {at} is {wrong}; weights must be finite"


# -- ids and lengths


def _an_id_outside(group: Any, data: st.DataObject, own: list[Feature], kind: str) -> str:
    """``kind``: of the ids."""
    ends = np.iinfo(kind)
    lengths = numbers(group.lengths, "<i4").reshape(len(own), -1)
    ids = numbers(group.values, "<i8") if kind == "<i8" else numbers(group.values, "<i8") % 5
    feature = data.draw(
        st.sampled_from([at for at, each in enumerate(own) if each.rows <= ends.max or each.least > ends.min])
    )
    taken, row = own[feature], place(data, lengths.shape[1])
    at = int(lengths.ravel()[: feature * lengths.shape[1] + row].sum()) + place(data, int(lengths[feature, row]))
    ids[at] = data.draw(
        st.integers(taken.rows, int(ends.max)) | st.integers(int(ends.min), taken.least - 1) | st.just(taken.rows)
    )
    group.values = ids.astype(kind).tobytes()
    return (
        f"feature {taken.name}, row {row}: id {ids[at]} is outside its table {taken.table}; ids are {taken.least} to "
        f"{taken.rows - 1}"
    )


def _bytes_of_odd_count(group: Any, data: st.DataObject, name: str) -> str:
    """Ids of 8 bytes, some of them lost."""
    ids = int(numbers(group.lengths, "<i4").sum())  # which as many int32 would be, too
    size = data.draw(st.integers(1, 8 * ids - 1).filter(lambda size: size != 4 * ids))
    group.values = group.values[:size]
    if size % 4:
        return f"{name}.values: {size} bytes are no whole number of int32"
    return f"{name}: lengths add up to {ids} ids and values holds {size // 4} int32"


def _lengths_of_both_widths(group: Any, data: st.DataObject, name: str) -> str:
    """The first so many as int64, the others as int32."""
    lengths = numbers(group.lengths, "<i4")
    if len(lengths) == 1:
        group.lengths = b""
        return f"{name}.lengths: 0 bytes for"
    wide = data.draw(st.integers(1, len(lengths) - 1))
    group.lengths = lengths[:wide].astype("<i8").tobytes() + lengths[wide:].tobytes()
    return f"{name}.lengths: {len(group.lengths)} bytes for"


def _a_length_that_is_none(group: Any, data: st.DataObject, own: list[Feature], name: str) -> str:
    kind = data.draw(st.sampled_from(["<i4", "<i8"]))
    lengths = numbers(group.lengths, "<i4").astype(kind)
    at = place(data, len(lengths))
    below = st.integers(int(np.iinfo(kind).min), -1)
    wrong = data.draw(below if kind == "<i4" else below | st.integers(2**31, 2**63 - 1))
    lengths[at] = wrong
    group.lengths = lengths.tobytes()
    feature, row = divmod(at, len(lengths) // len(own))
    told = "is negative" if wrong < 0 else "is no int32"
    return f"{name}: feature {own[feature].name}, row {row}: length {wrong} {told}"


# -- vectors and columns


def _a_vector_of_wrong_width(message: Message, data: st.DataObject) -> str:
    width = data.draw(st.integers(0, 9).filter(lambda width: width != 2))
    message.embedding_features.num_features = width
    return f"embedding_features.num_features is {width}; the model takes 2 columns there"


def _vectors_of_wrong_count(message: Message, data: st.DataObject) -> str:
    count = data.draw(st.integers(0, 40).filter(lambda count: count != 2 * message.batch_size))
    message.embedding_features.values = np.zeros(count, np.float32).tobytes()
    return (
        f"embedding_features.values: {4 * count} bytes for {message.batch_size} rows; the model takes 2 float32 a row"
    )


def _a_number_that_is_none(group: Any, data: st.DataObject, columns: int, taking: tuple[int, ...], name: str) -> str:
    values = numbers(group.values, "<f4")
    at, wrong = place(data, len(values)), data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    row, column = divmod(at, columns)
    if np.isnan(wrong) and column in taking:
        wrong = np.inf
    values[at] = wrong
    group.values = values.tobytes()
    told = ", and NaN is taken in columns 1 alone" if np.isnan(wrong) and taking else ""
    return f"{name}: row {row}, column {column} is {wrong}; values must be finite{told}"


def _a_group_of_other_features(message: Message, data: st.DataObject) -> str:
    """One of several is not as the model has it."""
    name, wanted = data.draw(
        st.sampled_from([("id_list_features", 2), ("id_score_list_features", 1), ("unary_features", 1)])
    )
    count = data.draw(st.integers(0, 5).filter(lambda count: count != wanted))
    getattr(message, name).num_features = count
    return f"{name}.num_features is {count}; the model takes {wanted} features there"


def _of(group: str, fault: Callable[..., str], *more: Any) -> Fault:
    return lambda message, data: fault(getattr(message, group), data, *more, group)


def _own(group: str) -> list[Feature]:
    return [feature for feature in GROUPED.features if feature.group == group]


def _columns(schema: ModelSchema, group: str, columns: int, taking: tuple[int, ...] = ()) -> Fault:
    name = f"{group}.values"
    return lambda message, data: _a_number_that_is_none(getattr(message, group), data, columns, taking, name)


def _ids(group: str, own: list[Feature], kind: str = "<i8") -> Fault:
    return lambda message, data: _an_id_outside(getattr(message, group), data, own, kind)


GROUPED_FAULTS: dict[str, Fault] = {
    "weights of wrong count": _of("id_score_list_features", _weights_of_wrong_count),
    "a weight that is no number": _of("id_score_list_features", _a_weight_that_is_no_number),
    "a vector of wrong width": _a_vector_of_wrong_width,
    "vectors of wrong count": _vectors_of_wrong_count,
    "a vector's number that is none": _columns(GROUPED, "embedding_features", 2),
    "a group of other features": _a_group_of_other_features,
    **{
        f"{what}, {group}": fault
        for group in ("id_list_features", "id_score_list_features", "unary_features")
        for what, fault in {
            "an id outside": _ids(group, _own(group)),
            "ids of odd count": _of(group, _bytes_of_odd_count),
            "lengths of both widths": _of(group, _lengths_of_both_widths),
            "a length that is none": _of(group, _a_length_that_is_none, _own(group)),
        }.items()
    },
}
PLAIN_FAULTS: dict[str, Fault] = {
    "an id beyond what the model searches for": _ids("id_list_features", list(PLAIN.features)),
    "an id of 32 bits": _ids("id_list_features", list(PLAIN.features), "<i4"),
    "ids of odd count": _of("id_list_features", _bytes_of_odd_count),
    "lengths of both widths": _of("id_list_features", _lengths_of_both_widths),
    "a length that is none": _of("id_list_features", _a_length_that_is_none, list(PLAIN.features)),
    "a number that is none": _columns(PLAIN, "float_features", 3, (1,)),
}
CASES = [("grouped", name) for name in GROUPED_FAULTS] + [("plain", name) for name in PLAIN_FAULTS]
FAULTS = {"grouped": GROUPED_FAULTS, "plain": PLAIN_FAULTS}
EXAMPLES = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize(("which", "name"), CASES)
@EXAMPLES
@given(data=st.data(), seed=st.integers(0, 2**16), rows=st.integers(1, 6))
def test_on_torchrec_s_wire(servers: Any, which: str, name: str, data: Any, seed: int, rows: int) -> None:
    schema = servers[which].schema

    def decode(body: bytes) -> Features:
        return predictor.decode(body, schema, LIMITS)

    message = torchrec(schema, right(schema, seed, rows))
    good = torchrec(schema, right(schema, seed + 1, rows)).SerializeToString()
    says = FAULTS[which][name](message, data)
    servers[which].check(
        (predictor.METHOD, message.SerializeToString(), decode), says, (predictor.METHOD, good, decode)
    )


def _a_weight_too_many(sparse: Any, data: st.DataObject) -> str:
    """Feature b of row 0 stands behind the ids of a."""
    lengths, weights = numbers(sparse.lengths, "<i4"), numbers(sparse.weights, "<f4")
    row = place(data, len(lengths) // 2)
    at = int(lengths[: 2 * row + 1].sum())
    wrong = np.float32(data.draw(st.floats(-9, 9, width=32).filter(lambda weight: weight != 1)))
    weights[at] = wrong
    sparse.weights = weights.tobytes()
    return f"sparse: feature b, row {row}: weight {wrong}, but the feature takes no weights; send 1"


def _ids_of_another_width(sparse: Any, data: st.DataObject) -> str:
    """They are of 64 bits; as such of 32 they would be twice as many."""
    sparse.id_type = 0
    count = len(sparse.weights) // 4
    return f"sparse: lengths add up to {count} ids and values holds {2 * count} int32"


NARSIL_FAULTS: dict[str, Fault] = {
    "weights of wrong count": lambda message, data: _weights_of_wrong_count(message.sparse, data, "sparse"),
    "a weight that is no number": lambda message, data: _a_weight_that_is_no_number(message.sparse, data, "sparse"),
    "a weight of a feature that takes none": lambda message, data: _a_weight_too_many(message.sparse, data),
    "ids of another width": lambda message, data: _ids_of_another_width(message.sparse, data),
}


@pytest.mark.parametrize("name", NARSIL_FAULTS)
@EXAMPLES
@given(data=st.data(), seed=st.integers(0, 2**16), rows=st.integers(1, 6))
def test_on_narsil_s_wire(servers: Any, name: str, data: Any, seed: int, rows: int) -> None:
    def decode(body: bytes) -> Features:
        return narsil_v1.decode(body, WEIGHTED, LIMITS)

    message, good = (by_rows(right(WEIGHTED, each, rows)) for each in (seed, seed + 1))
    says = NARSIL_FAULTS[name](message, data)
    bad = (narsil_v1.METHOD, message.SerializeToString(), decode)
    servers["weighted"].check(bad, says, (narsil_v1.METHOD, good.SerializeToString(), decode))
