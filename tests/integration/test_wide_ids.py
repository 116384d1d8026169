"""Ids of 64 bits, negative ones among them, end to end: through managed collision and a remainder, on every wire and
either transport, and by a compiled model. Those of a plain table beside them stay bounded by it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from click.testing import CliRunner

import narsil
from narsil.artifacts.artifact import open_artifact
from narsil.bench.servers import ServerProcess, narsil_server
from narsil.cli import cli
from narsil.errors import InvalidRequest
from narsil.extension import AVAILABLE
from narsil.transports.codec import predictor
from tests.fixtures_compiled import needs_compiler, needs_fused
from tests.messages import inference_pb2, predictor_pb2
from tests.support import PATIENCE_S, unary

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchrec")
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.integration.test_feature_inputs import takes

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES, ROWS = ("managed", "hashed", "plain"), (20, 30, 40)
KNOWN = [-(2**62), -77, -1, 3, 17, 2**31 + 5, 2**40 + 1, 2**62]
IDS = np.array([*KNOWN, -(2**63), -(2**31) - 1, -5, 0, 2**31, 2**63 - 2], np.int64)
TOLERANCE = 2e-5
Ids = list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]  # by feature: (B,) lengths, ids


class Remapped(torch.nn.Module):  # type: ignore[name-defined]
    """Three features, each with a way of its own to its table."""

    def __init__(self) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(name=f"t_{name}", num_embeddings=rows, embedding_dim=4, feature_names=[name])
            for name, rows in zip(NAMES, ROWS, strict=True)
        ]
        self.bags = EmbeddingBagCollection(device=torch.device("cpu"), tables=tables)
        for parameter in self.bags.parameters():
            torch.nn.init.normal_(parameter)
        self.over = torch.nn.Linear(12, 1)
        self.register_buffer("known", torch.tensor([*KNOWN, 2**63 - 1]))
        self.register_buffer("places", torch.tensor([5, 0, 18, 3, 12, 7, 1, 9, 2]))

    def managed(self, ids: Any) -> Any:
        at = torch.searchsorted(self.known[:-1], ids)
        return torch.where(self.known[at] == ids, self.places[at], torch.full_like(ids, 19))

    @takes()
    def forward(self, data: Any) -> Any:
        lengths, values = data["id_list_features.lengths"], data["id_list_features.values"]
        keyed = KeyedJaggedTensor(keys=list(NAMES), lengths=lengths, values=values)
        first, second, third = keyed.split([1, 1, 1])
        ids = torch.cat([self.managed(first.values()), second.values() % 30, third.values()])
        sparse = KeyedJaggedTensor(keys=list(NAMES), lengths=lengths, values=ids)
        return self.over(self.bags(sparse).values()).sigmoid().squeeze(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from torchrec.fx.tracer import Tracer

    torch.manual_seed(2)
    module = Remapped().eval()
    path = tmp_path_factory.mktemp("remapped") / "model_default.pt"
    torch.jit.script(torch.fx.GraphModule(module, Tracer().trace(module))).save(str(path))
    return path


@pytest.fixture(scope="module")
def compiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compiled") / "remapped"
    done = CliRunner().invoke(cli, ["compile", str(model), "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


def bags(rows: int, seed: int, longest: int = 3) -> Ids:
    random = np.random.default_rng(seed)
    made = []
    for name in NAMES:
        lengths = np.ones(rows, np.int64) if longest == 1 else random.integers(0, longest + 1, rows)
        count = int(lengths.sum())
        ids = random.integers(0, ROWS[2], count) if name == "plain" else random.choice(IDS, count)
        made.append((lengths, ids))
    return made


def direct(path: Path, given: Ids) -> Any:
    module = torch.jit.load(str(path))
    inputs = {
        "id_list_features.lengths": torch.tensor(np.concatenate([lengths for lengths, _ in given])),
        "id_list_features.values": torch.tensor(np.concatenate([ids for _, ids in given])),
    }
    with torch.no_grad():
        return module(inputs).numpy()


def sample_major(given: Ids) -> tuple[Any, Any]:
    """(ids, (B, T) lengths) with the bags of row 0 first."""
    cut = [np.split(ids, np.cumsum(lengths)[:-1]) for lengths, ids in given]
    return np.concatenate([part for row in zip(*cut, strict=True) for part in row]), np.stack(
        [lengths for lengths, _ in given], axis=1
    )


def by_narsil(address: str, given: Ids) -> Any:
    values, lengths = sample_major(given)
    with narsil.Client(address) as client:
        dense = np.empty((len(lengths), 0), np.float32)
        return client.predict(dense, values, lengths, timeout=PATIENCE_S).scores["default"]


def by_predictor(address: str, given: Ids) -> Any:
    message = predictor_pb2.PredictionRequest(batch_size=len(given[0][0]))
    message.id_list_features.num_features = len(given)
    message.id_list_features.lengths = np.concatenate([lengths for lengths, _ in given]).astype("<i4").tobytes()
    message.id_list_features.values = np.concatenate([ids for _, ids in given]).astype("<i8").tobytes()
    with grpc.insecure_channel(address) as channel:
        body = unary(channel, predictor.METHOD)(message.SerializeToString(), timeout=PATIENCE_S)
    return np.array(predictor_pb2.PredictionResponse.FromString(body).predictions["default"].data, np.float32)


def by_oip(address: str, given: Ids) -> Any:
    values, lengths = sample_major(given)
    message = inference_pb2.ModelInferRequest()
    for name, kind, array in (("ids.values", "INT64", values), ("ids.lengths", "INT32", lengths.astype("<i4"))):
        message.inputs.add(name=name, datatype=kind, shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    with grpc.insecure_channel(address) as channel:
        call = unary(channel, "/inference.GRPCInferenceService/ModelInfer")
        body = call(message.SerializeToString(), timeout=PATIENCE_S)
    return np.frombuffer(inference_pb2.ModelInferResponse.FromString(body).raw_output_contents[0], "<f4")


WIRES: dict[str, Callable[[str, Ids], Any]] = {"narsil": by_narsil, "predictor": by_predictor, "oip": by_oip}
SERVED: list[Any] = [
    ("torch", "grpcio"),
    ("torch", "native"),
    pytest.param(("compiled", "native"), marks=[needs_fused, needs_compiler]),
]


@pytest.fixture(scope="module", params=SERVED, ids=str)
def server(request: Any, model: Path) -> Iterator[ServerProcess]:
    backend, transport = request.param
    if transport == "native" and not AVAILABLE:
        pytest.skip("built without the native extension")
    path = model if backend == "torch" else request.getfixturevalue("compiled")
    with narsil_server(path, backend=backend, transport=transport, lanes=2) as process:
        yield process


def test_the_schema_tells_which_ids_a_feature_takes(model: Path) -> None:
    schema = open_artifact(model).schema
    assert schema.id_dtype == np.int64
    assert schema.rows.tolist() == [2**63 - 1, 2**63 - 1, ROWS[2]]
    assert schema.least.tolist() == [-(2**63), -(2**63), 0]
    assert "-9,223,372,036,854,775,808" in CliRunner().invoke(cli, ["inspect", str(model)], terminal_width=200).output


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("longest", [1, 3])
def test_ids_of_64_bits_score_as_in_a_direct_call(server: ServerProcess, model: Path, wire: str, longest: int) -> None:
    for seed, rows in enumerate((1, 5, 60)):
        given = bags(rows, seed, longest)
        expected = direct(model, given)
        np.testing.assert_allclose(WIRES[wire](server.address, given), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("wrong", [-1, -(2**40), ROWS[2], 2**32 + 1])
def test_ids_of_the_plain_table_stay_bounded_by_it(server: ServerProcess, model: Path, wire: str, wrong: int) -> None:
    given = bags(4, 9, 1)
    given[2][1][3] = wrong
    with pytest.raises((InvalidRequest, grpc.RpcError)) as refused:
        WIRES[wire](server.address, given)
    error: Any = refused.value
    text = error.details() if isinstance(error, grpc.RpcError) else str(error)
    assert f"feature plain, row 3: id {wrong} is outside its table" in text
    assert "ids are 0 to 39" in text
    good = bags(4, 10)
    np.testing.assert_allclose(WIRES[wire](server.address, good), direct(model, good), atol=TOLERANCE, rtol=0)


def test_the_largest_int64_is_refused_with_what_is_taken(server: ServerProcess) -> None:
    given = bags(2, 9, 1)
    given[1][1][1] = 2**63 - 1
    with pytest.raises(InvalidRequest, match=r"feature hashed, row 1: .* ids are -9223372036854775808 to \d+6$"):
        by_narsil(server.address, given)


def test_verify_draws_them_and_finds_the_same_scores(server: ServerProcess, model: Path) -> None:
    with narsil.Client(server.address) as client:
        assert client.model().schema.least.tolist() == [-(2**63), -(2**63), 0]
    done = CliRunner().invoke(cli, ["verify", "--target", server.address, "--model", str(model)])
    assert done.exit_code == 0, done.output
