"""NaN as a missing number, end to end: a model that takes it in some columns is served with --allow-nan by either
transport and backend, and scores as a direct call; without it, and in other columns, NaN is refused by name."""

from __future__ import annotations

import json
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
from narsil.backends.registry import load_backend
from narsil.bench.servers import ServerDied, ServerProcess, narsil_server
from narsil.cli import cli
from narsil.dataflow import Batch, Features, OneHot
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
    from torchrec.fx.tracer import Tracer
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from narsil.compile.compiler import compile_artifact

from tests.integration.test_feature_inputs import NAMES, ROWS, bags, takes

pytestmark = pytest.mark.filterwarnings("ignore")

FILLED, DENSE = (0, 1, 3), 4
TOLERANCE = 2e-5


class Fills(torch.nn.Module):  # type: ignore[name-defined]
    """Columns 0 and 1 by nan_to_num, 2 as it is, 3 by its mean where it is missing, with an indicator."""

    def __init__(self) -> None:
        super().__init__()
        self.bags, self.over = bags(NAMES, ROWS), torch.nn.Linear(17, 8)
        self.last = torch.nn.Linear(8, 1)

    @takes()
    def forward(self, data: Any) -> Any:
        x = data["float_features"]
        last = x[:, 3:]
        missing = torch.isnan(last)
        kept = torch.where(missing, torch.full_like(last, 0.75), torch.log1p(last.abs()))
        sparse = KeyedJaggedTensor(
            keys=list(NAMES), lengths=data["id_list_features.lengths"], values=data["id_list_features.values"]
        )
        parts = [torch.nan_to_num(x[:, :2], 0.25), x[:, 2:3], kept, missing.float(), self.bags(sparse).values()]
        return torch.sigmoid(self.last(torch.relu(self.over(torch.cat(parts, 1))))).squeeze(1)


class Unread(torch.nn.Module):  # type: ignore[name-defined]
    """Fills columns under a branch that looks at rows, so that no program is made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.over = torch.nn.Linear(DENSE, 1)

    def forward(self, data: dict[str, torch.Tensor]) -> torch.Tensor:  # type: ignore[name-defined]
        x = data["float_features"]
        filled = torch.cat([x[:, :2].nan_to_num(0.5), x[:, 2:]], 1)
        if x.shape[0] > 1000:
            filled = filled * 1.0
        return torch.sigmoid(self.over(filled)).squeeze(1)


class Meets(torch.nn.Module):  # type: ignore[name-defined]
    """NaN meets every function that a plan has, before what comes of it is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(DENSE, 4), torch.nn.Linear(131, 1)
        self.register_buffer("means", torch.tensor([0.25, -0.5, 0.75, 0.125]))

    def forward(self, data: dict[str, torch.Tensor]) -> torch.Tensor:  # type: ignore[name-defined]
        x, means = data["float_features"], self.means
        f = torch.nn.functional
        made = [
            *(torch.relu(x), torch.sigmoid(x), torch.tanh(x), f.silu(x), f.gelu(x), f.gelu(x, approximate="tanh")),
            *(f.leaky_relu(x, 0.1), torch.exp(-x.abs()), torch.log1p(x.abs()), torch.log(x.abs() + 1.0)),
            *(torch.sqrt(x.abs()), x.neg(), torch.reciprocal(x + 9.0), torch.floor(x), x.clamp(-0.5, 0.5)),
            *(x.clamp(min=0.1), x.clamp(max=0.1), torch.maximum(x, means), torch.minimum(x, means)),
            *(x + means, x - means, x * means, x / means, f.layer_norm(x, [4]), torch.softmax(x, 1), self.first(x)),
            *(x.amax(1, True), x.amin(1, True), x.mean(1, True)),
        ]
        truths = [
            *((x > means).float(), (x >= means).float(), (x < means).float(), (x <= means).float()),
            *((x == means).float(), (x != means).float()),
        ]
        every = torch.cat([torch.cat(made, 1).nan_to_num(0.375), torch.cat(truths, 1)], 1)
        return torch.sigmoid(self.last(every)).squeeze(1)


def saved(module: Any, path: Path) -> Path:
    torch.jit.script(module).save(str(path))
    return path


@pytest.fixture(scope="module")
def fills(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    module = Fills().eval()
    made = torch.fx.GraphModule(module, Tracer().trace(module))
    return saved(made, tmp_path_factory.mktemp("fills") / "model_default.pt")


@pytest.fixture(scope="module")
def compiled(fills: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compiled") / "fills"
    done = CliRunner().invoke(cli, ["compile", str(fills), "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


def rows_of(count: int, seed: int, columns: tuple[int, ...] = FILLED) -> Features:
    random = np.random.default_rng(seed)
    dense = random.standard_normal((count, DENSE)).astype(np.float32)
    dense[:, list(columns)] = np.where(
        random.random((count, len(columns))) < 0.5, np.float32(np.nan), dense[:, list(columns)]
    )
    ids = random.integers(0, np.array(ROWS)[:, None], (len(ROWS), count)).astype(np.int32)
    return Features(count, dense, OneHot(ids))


def direct(path: Path, features: Features) -> Any:
    module = torch.jit.load(str(path))
    assert isinstance(features.sparse, OneHot)
    inputs = {
        "float_features": torch.tensor(features.dense),
        "id_list_features.lengths": torch.ones(features.sparse.ids.size, dtype=torch.int32),
        "id_list_features.values": torch.tensor(features.sparse.ids.ravel()),
    }
    with torch.no_grad():
        return module(inputs).numpy()


def by_narsil(address: str, features: Features) -> Any:
    assert isinstance(features.sparse, OneHot)
    with narsil.Client(address) as client:
        return client.predict(features.dense, features.sparse.ids.T, timeout=PATIENCE_S).scores["default"]


def _asked(address: str, method: str, message: Any) -> bytes:
    with grpc.insecure_channel(address) as channel:
        reply: bytes = unary(channel, method)(message.SerializeToString(), timeout=PATIENCE_S)
        return reply


def by_predictor(address: str, features: Features) -> Any:
    assert isinstance(features.sparse, OneHot)
    ids = features.sparse.ids
    message = predictor_pb2.PredictionRequest(
        batch_size=features.rows,
        float_features={"num_features": DENSE, "values": features.dense.tobytes()},
        id_list_features={
            "num_features": len(ids),
            "lengths": np.ones(ids.shape, np.int32).tobytes(),
            "values": ids.tobytes(),
        },
    )
    reply = predictor_pb2.PredictionResponse.FromString(_asked(address, predictor.METHOD, message))
    return np.array(reply.predictions["default"].data, np.float32)


def by_oip(address: str, features: Features) -> Any:
    assert isinstance(features.sparse, OneHot)
    ids = np.ascontiguousarray(features.sparse.ids.T, np.int64)
    message = inference_pb2.ModelInferRequest(model_name="")
    for name, kind, array in (("dense", "FP32", features.dense), ("ids", "INT64", ids)):
        message.inputs.add(name=name, datatype=kind, shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    reply = inference_pb2.ModelInferResponse.FromString(
        _asked(address, "/inference.GRPCInferenceService/ModelInfer", message)
    )
    return np.frombuffer(reply.raw_output_contents[0], "<f4")


WIRES: dict[str, Callable[[str, Features], Any]] = {"narsil": by_narsil, "predictor": by_predictor, "oip": by_oip}


SERVED: list[Any] = [
    ("torch", "grpcio"),
    ("torch", "native"),
    pytest.param(("compiled", "native"), marks=[needs_fused, needs_compiler]),
]


@pytest.fixture(scope="module", params=SERVED, ids=str)
def server(request: Any, fills: Path) -> Iterator[ServerProcess]:
    backend, transport = request.param
    if transport == "native" and not AVAILABLE:
        pytest.skip("built without the native extension")
    path = fills if backend == "torch" else request.getfixturevalue("compiled")
    with narsil_server(path, backend=backend, transport=transport, allow_nan=True, lanes=2) as process:
        yield process


@pytest.mark.parametrize("wire", WIRES)
def test_missing_numbers_score_as_in_a_direct_call(server: ServerProcess, fills: Path, wire: str) -> None:
    for seed, count in enumerate((1, 2, 37)):
        features = rows_of(count, seed)
        expected = direct(fills, features)
        np.testing.assert_allclose(WIRES[wire](server.address, features), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize(("column", "value"), [(2, np.nan), (0, np.inf), (3, -np.inf)])
def test_other_numbers_that_are_none_stay_refused_by_name(
    server: ServerProcess, fills: Path, wire: str, column: int, value: float
) -> None:
    features = rows_of(5, 1)
    features.dense[3, column] = value
    with pytest.raises((InvalidRequest, grpc.RpcError)) as refused:
        WIRES[wire](server.address, features)
    error: Any = refused.value
    text = error.details() if isinstance(error, grpc.RpcError) else str(error)
    assert f"row 3, column {column} is {np.float32(value)}; values must be finite" in text
    if np.isnan(value):
        assert "NaN is taken in columns 0, 1, 3 alone" in text
    good = rows_of(3, 2)
    np.testing.assert_allclose(WIRES[wire](server.address, good), direct(fills, good), atol=TOLERANCE, rtol=0)


def test_the_server_tells_in_which_columns_and_verify_sends_them(server: ServerProcess, fills: Path) -> None:
    with narsil.Client(server.address) as client:
        assert client.model().schema.nan_columns == FILLED
    done = CliRunner().invoke(cli, ["verify", "--target", server.address, "--model", str(fills)])
    assert done.exit_code == 0, done.output
    assert "0 rows left out" not in done.output


def test_inspect_and_manifests_tell_them(fills: Path, compiled: Path) -> None:
    assert open_artifact(fills).schema.nan_columns == FILLED
    told = CliRunner().invoke(cli, ["inspect", str(fills)]).output
    assert "takes NaN, for a missing number, in columns 0 to 1, 3" in told
    assert json.loads((compiled / "manifest.json").read_bytes())["schema"]["nan_columns"] == list(FILLED)


def test_without_the_option_nan_is_refused_and_the_next_step_told(fills: Path) -> None:
    with narsil_server(fills, lanes=1) as server, narsil.Client(server.address) as client:
        features = rows_of(4, 0)
        assert isinstance(features.sparse, OneHot)
        assert client.model().schema.nan_columns == ()
        with pytest.raises(InvalidRequest, match="--allow-nan serves a model that takes NaN"):
            client.predict(features.dense, features.sparse.ids.T)


def test_columns_of_a_model_that_is_not_read_are_found_by_trial(tmp_path: Path) -> None:
    torch.manual_seed(4)
    path = saved(Unread().eval(), tmp_path / "model_default.pt")
    assert open_artifact(path).schema.nan_columns == ()
    options = {"lanes": 1, "allow_nan": True, "execution_mode": "worker"}  # a branch leaves requests whole
    with narsil_server(path, **options) as server, narsil.Client(server.address) as client:
        assert client.model().schema.nan_columns == (0, 1)
        dense = rows_of(6, 3, (0, 1)).dense
        scores = client.predict(dense, np.empty((6, 0), np.int32)).scores["default"]
        wanted = torch.jit.load(str(path))({"float_features": torch.tensor(dense)}).detach().numpy()
        np.testing.assert_allclose(scores, wanted, atol=TOLERANCE)


def test_a_model_that_takes_none_is_refused_with_it(small_artifact: Any) -> None:
    with pytest.raises(ServerDied, match=r"--allow-nan allows nothing: leave it out"):
        narsil_server(small_artifact.path, backend="torch", allow_nan=True).start()


@needs_fused
@needs_compiler
@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_what_nan_meets_in_a_compiled_model_makes_of_it_what_torch_makes(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(4)
    source = open_artifact(saved(Meets().eval(), tmp_path / "model_default.pt"))
    assert source.schema.nan_columns == (0, 1, 2, 3)
    compiled, _ = compile_artifact(source, tmp_path / "out", precision=precision, engine="fused")
    reference, backend = load_backend(source, "torch"), load_backend(compiled, "compiled")
    rows = rows_of(64, 5, (0, 1, 2, 3)).dense
    rows[0] = np.nan
    batch = Batch(64, rows, np.empty(0, np.int32), np.empty(0, np.int32), one_hot=True)
    expected, found = reference.run(batch)["default"], backend.run(batch)["default"]
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=TOLERANCE if precision == "fp32" else 2e-3, rtol=0)
