"""A TorchRec client that knows only predictor.proto gets the right scores from an artifact that TorchRec's own packager
made, while malformed requests of every kind beside it each get their named error."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest

from narsil.artifacts.artifact import Artifact, open_artifact
from narsil.backends.registry import load_backend
from narsil.bench.servers import ServerProcess, narsil_server
from narsil.bench.workload import predictor_body
from narsil.client import Context, build_request
from narsil.engine.collate import Collator
from narsil.transports.codec import narsil_v1, predictor
from tests.messages import Message, narsil_pb2, predictor_pb2
from tests.support import PATIENCE_S, jagged, one_hot, unary
from tests.torchrec_models import DENSE, NAMES, ROWS, dlrm

pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-5
T = len(NAMES)
D = DENSE
LARGEST = NAMES[int(np.argmax(ROWS))]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    path = tmp_path_factory.mktemp("torchrec") / "model_default.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dlrm(path)
    return open_artifact(path)


@pytest.fixture(scope="module")
def server(artifact) -> Iterator[ServerProcess]:
    with narsil_server(artifact.path, lanes=2) as process:
        yield process


Torchrec = Callable[[Message], None]


def torchrec(change: Torchrec) -> tuple[str, Callable[[Artifact], bytes]]:
    """A good two-row TorchRec request with something broken in it."""

    def body(artifact: Artifact) -> bytes:
        message = predictor_pb2.PredictionRequest.FromString(predictor_body(one_hot(2, 1, artifact.schema)))
        change(message)
        return message.SerializeToString()

    return predictor.METHOD, body


def narsil(change: Callable[[Message], None]) -> tuple[str, Callable[[Artifact], bytes]]:
    """A good two-row narsil.v1 request with something broken in it."""

    def body(artifact: Artifact) -> bytes:
        message = narsil_pb2.PredictRequest.FromString(build_request(np.zeros((2, D)), np.zeros((2, T), np.int32)))
        change(message)
        return message.SerializeToString()

    return narsil_v1.METHOD, body


def raw(method: str, body: bytes) -> tuple[str, Callable[[Artifact], bytes]]:
    return method, lambda artifact: body


def put(field: str, position: int, value: float, dtype: type = np.int32) -> Torchrec:
    """Overwrites one number of a bytes field, given by its path."""
    *groups, name = field.split(".")

    def change(message) -> None:
        for group in groups:
            message = getattr(message, group)
        numbers = np.frombuffer(getattr(message, name), dtype).copy()
        numbers[position] = value
        setattr(message, name, numbers.tobytes())

    return change


def assign(field: str, value: object) -> Callable[..., None]:
    *groups, name = field.split(".")

    def change(message) -> None:
        for group in groups:
            message = getattr(message, group)
        setattr(message, name, value)

    return change


IDS = "id_list_features"
BROKEN: dict[str, tuple[tuple[str, Callable[[Artifact], bytes]], str]] = {
    "empty message": (raw(predictor.METHOD, b""), "float_features.num_features is 0"),
    "no protobuf": (raw(predictor.METHOD, b"\xff" * 40), "not a valid protobuf message"),
    "cut in the middle": (raw(predictor.METHOD, b"\x08\x02\x12\x7f\x01"), "claims 127 bytes"),
    "batch size negative": (torchrec(assign("batch_size", -1)), "batch_size is -1"),
    "batch size huge": (torchrec(assign("batch_size", 2**31 - 1)), "batch_size is 2147483647"),
    "batch size of another request": (torchrec(assign("batch_size", 3)), "bytes for 3 rows"),
    "dense missing": (torchrec(lambda m: m.ClearField("float_features")), "float_features.num_features is 0"),
    "dense feature extra": (torchrec(assign("float_features.num_features", D + 1)), f"the model takes {D} dense"),
    "dense bytes odd": (torchrec(assign("float_features.values", b"123")), "no whole number of float32"),
    "dense bytes short": (torchrec(assign("float_features.values", b"1234")), "4 bytes for 2 rows"),
    "dense NaN": (torchrec(put("float_features.values", D, np.nan, np.float32)), "row 1, column 0 is nan"),
    "dense infinite": (torchrec(put("float_features.values", 2, np.inf, np.float32)), "row 0, column 2 is inf"),
    "sparse missing": (torchrec(lambda m: m.ClearField(IDS)), f"{IDS}.num_features is 0"),
    "sparse feature extra": (torchrec(assign(f"{IDS}.num_features", T + 1)), f"num_features is {T + 1}"),
    "sparse feature missing": (torchrec(assign(f"{IDS}.num_features", T - 1)), f"the model takes {T} sparse"),
    "lengths missing": (torchrec(assign(f"{IDS}.lengths", b"")), f"0 bytes for {T} features x 2 rows"),
    "length negative": (torchrec(put(f"{IDS}.lengths", 0, -1)), f"feature {NAMES[0]}, row 0: length -1 is negative"),
    "lengths too small": (torchrec(put(f"{IDS}.lengths", 1, 0)), f"add up to {2 * T - 1} ids and values holds {2 * T}"),
    "lengths too large": (torchrec(put(f"{IDS}.lengths", 1, 2**31 - 1)), "lengths add up to 21474836"),
    "values missing": (torchrec(assign(f"{IDS}.values", b"")), "values holds 0 int32"),
    "values of int64": (
        torchrec(assign(f"{IDS}.values", np.full(2 * T, -5, np.int64).tobytes())),
        f"feature {NAMES[0]}, row 0: id -5 is outside its table",
    ),
    "id negative": (torchrec(put(f"{IDS}.values", 0, -5)), f"feature {NAMES[0]}, row 0: id -5 is outside its table"),
    "id at the end of its table": (
        torchrec(put(f"{IDS}.values", 3, ROWS[1])),
        f"feature {NAMES[1]}, row 1: id {ROWS[1]} is outside its table t_{NAMES[1]}; ids are 0 to {ROWS[1] - 1}",
    ),
    "id in the padding of its table": (torchrec(put(f"{IDS}.values", 0, ROWS[0] + 1)), f"ids are 0 to {ROWS[0] - 1}"),
    "weights": (torchrec(assign(f"{IDS}.weights", b"\0" * 8 * T)), "no table of this model takes weights"),
    "narsil: wrong dtype": (narsil(assign("sparse.id_type", 1)), "without lengths each bag holds one int64"),
    "narsil: unknown dtype": (narsil(assign("sparse.id_type", 9)), "sparse.id_type is 9"),
    "narsil: unknown feature": (narsil(lambda m: m.sparse.feature_names.append("colour")), "no feature 'colour'"),
    "narsil: id past its table": (
        narsil(put("sparse.values", T + 2, 10**9)),
        f"feature {NAMES[2]}, row 1: id 1000000000 is outside its table",
    ),
    "narsil: lengths that do not add up": (narsil(assign("sparse.lengths", b"\0" * 8 * T)), "lengths add up to 0"),
    "narsil: weights": (narsil(assign("sparse.weights", b"\0" * 8 * T)), "no table of this model takes weights"),
    "narsil: a context that claims too many ids": (
        raw(
            narsil_v1.METHOD,
            build_request(
                np.zeros((100_000, 0)),
                np.zeros((100_000, 0), np.int32),
                context=Context({name: [0] * (100 if name == LARGEST else 1) for name in NAMES}, range(D), [0.0] * D),
            ),
        ),
        "ids in all; the limit is",
    ),
}


def test_there_are_at_least_thirty_kinds_of_broken_request():
    assert len(BROKEN) >= 30


def test_good_requests_are_answered_rightly_while_broken_ones_are_refused_by_name(server, artifact):
    backend = load_backend(artifact, tune_kernels=False)
    collator = Collator(artifact.schema)
    wrong: list[str] = []
    answered: list[int] = []
    stop = threading.Event()

    def good(seed: int) -> None:
        """A TorchRec client: predictor.proto and nothing of Narsil's."""
        with grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = channel.unary_unary(
                "/predictor.Predictor/Predict",
                request_serializer=predictor_pb2.PredictionRequest.SerializeToString,
                response_deserializer=predictor_pb2.PredictionResponse.FromString,
            )
            number = 0
            while not stop.is_set():
                features = (one_hot, jagged)[number % 2](1 + (7 * number + seed) % 60, number, artifact.schema)
                request = predictor_pb2.PredictionRequest.FromString(predictor_body(features))
                scores = np.float32(call(request, timeout=PATIENCE_S).predictions["default"].data)
                with guard:
                    expected = backend.run(collator.collate([features]))["default"]
                    if np.abs(scores - expected).max() > TOLERANCE:
                        wrong.append(f"seed {seed}, number {number}")
                    answered.append(number)
                number += 1

    guard = threading.Lock()
    clients = [threading.Thread(target=good, args=(seed,)) for seed in range(3)]
    for client in clients:
        client.start()
    with grpc.insecure_channel(server.address) as channel:
        rounds = 0
        while rounds < 3 or (len(answered) < 30 and all(client.is_alive() for client in clients)):
            rounds += 1
            for kind, ((method, body), message) in BROKEN.items():
                future = unary(channel, method).future(body(artifact), timeout=PATIENCE_S)
                if future.code() is not grpc.StatusCode.INVALID_ARGUMENT or message not in future.details():
                    wrong.append(f"{kind}: {future.code()}: {future.details()}")
    stop.set()
    for client in clients:
        client.join(PATIENCE_S)
    assert wrong == []
