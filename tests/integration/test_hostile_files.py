"""Files that nobody could have meant: every reader refuses them in one sentence, or reads them, and raises nothing
else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("fbgemm_gpu")
pytest.importorskip("onnx")
safetensors = pytest.importorskip("safetensors.torch")

from click.testing import CliRunner  # noqa: E402

from narsil.artifacts.artifact import BACKEND_ROLES, MANIFEST, Artifact, open_artifact  # noqa: E402
from narsil.artifacts.onnx_weights import check_graph  # noqa: E402
from narsil.artifacts.watching import Watch  # noqa: E402
from narsil.cli import cli  # noqa: E402
from narsil.compile.calibration import load_calibration  # noqa: E402
from narsil.errors import NarsilError  # noqa: E402
from narsil.packaging.checkpoint import load_checkpoint  # noqa: E402
from narsil.packaging.dlrm import DlrmConfig, random_weights, table_key  # noqa: E402
from tests.fixtures_models import small  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's and numpy's readers: what matters is what they raise
fuzzed = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def is_one_sentence(text: str) -> bool:
    return text.isprintable() and 20 < len(text) < 2000


def refused(read: Callable[[], object]) -> str | None:
    """What the reader says; None where it reads the file. Any other exception than Narsil's own fails the test."""
    said = None
    try:
        read()
    except NarsilError as error:
        said = str(error)
    assert said is None or is_one_sentence(said), said
    return said


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes with something changed, cut off, put in or taken out."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "remove", "zero"]))
        if kind == "flip" and at < len(content):
            content[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=64))
        elif kind == "remove":
            del content[at : at + draw(st.integers(1, 64))]
        elif kind == "zero":
            content[at : at + 64] = bytes(len(content[at : at + 64]))
    return bytes(content)


# -- manifests ---------------------------------------------------------------------------------------------------------

LONG = "an integer that Python does not convert"

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([LONG, -1, 0]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in plain values."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, part in inner for place in places(part, (*at, key)))]


@st.composite
def changed(draw: st.DrawFn, whole: dict[str, Any]) -> str:
    """A manifest with values replaced by others, taken away or added."""
    manifest = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from([place for place in places(manifest) if place]))
        parent = manifest
        for key in way:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace", "remove", "add"]))
        if kind == "replace":
            parent[last] = draw(plain)
        elif kind == "remove":
            del parent[last]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=8))] = draw(plain)
    return json.dumps(manifest).replace(f'"{LONG}"', "9" * 5000)


def look_at(folder: Path) -> None:
    """All that is done with an artifact before a backend loads it."""
    artifact = open_artifact(folder)
    for backend in BACKEND_ROLES:
        refused(partial(artifact.files_for, backend))
        Watch(artifact, backend).look()
    done = CliRunner().invoke(cli, ["inspect", str(folder)])
    assert done.exception is None or isinstance(done.exception, NarsilError | SystemExit), done.exc_info
    done = CliRunner().invoke(cli, ["inspect", str(folder), "--json"])
    assert done.exception is None or isinstance(done.exception, NarsilError | SystemExit), done.exc_info


@pytest.fixture
def copy(small_artifact: Artifact, tmp_path: Path) -> Path:
    shutil.copytree(small_artifact.path, tmp_path / "copy")
    return tmp_path / "copy"


@fuzzed
@given(data=st.data())
def test_a_manifest_may_say_anything(copy: Path, small_artifact: Artifact, data: st.DataObject) -> None:
    (copy / MANIFEST).write_text(data.draw(changed(dict(small_artifact.manifest or {}))))
    refused(lambda: look_at(copy))


@fuzzed
@given(data=st.data())
def test_a_manifest_may_be_any_bytes(copy: Path, small_artifact: Artifact, data: st.DataObject) -> None:
    whole = (small_artifact.path / MANIFEST).read_bytes()
    (copy / MANIFEST).write_bytes(data.draw(damaged(whole)))
    refused(lambda: look_at(copy))


# -- models ------------------------------------------------------------------------------------------------------------


@fuzzed
@given(data=st.data())
def test_a_torchscript_file_may_be_any_bytes(small_artifact: Artifact, tmp_path: Path, data: st.DataObject) -> None:
    assert small_artifact.torchscript is not None
    file = tmp_path / "model_default.pt"
    file.write_bytes(data.draw(damaged(small_artifact.torchscript.read_bytes())))
    refused(lambda: open_artifact(file))


@fuzzed
@given(data=st.data())
def test_a_graph_may_be_any_bytes(small_artifact: Artifact, tmp_path: Path, data: st.DataObject) -> None:
    assert small_artifact.onnx is not None
    file = tmp_path / "graph.onnx"
    file.write_bytes(data.draw(damaged(small_artifact.onnx.read_bytes())))
    refused(lambda: check_graph(file, small_artifact.onnx_data, small_artifact.schema))


# -- checkpoints -------------------------------------------------------------------------------------------------------

TINY = DlrmConfig(tables=2, rows=(3, 5), dim=4, dense_features=2, dense_arch=(4,), over_arch=(3, 1))


@pytest.fixture(scope="module", params=["pt", "safetensors"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("checkpoint") / f"trained.{request.param}"
    save(path, {name: torch.from_numpy(array) for name, array in random_weights(TINY).items()})
    return path


def save(path: Path, state: dict[str, Any]) -> None:
    if path.suffix == ".safetensors":
        safetensors.save_file(state, str(path))
    else:
        torch.save(state, path)


@fuzzed
@given(data=st.data())
def test_a_checkpoint_may_be_any_bytes(checkpoint: Path, tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / checkpoint.name
    file.write_bytes(data.draw(damaged(checkpoint.read_bytes())))
    refused(lambda: load_checkpoint(file))


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
kinds = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.complex64])
names = st.text(max_size=12) | st.sampled_from(
    [
        *random_weights(TINY),
        table_key("t_" + "9" * 5000),
        table_key("a b"),
        table_key("x\n"),
        "over_arch.model.0._mlp.7._linear.weight",
        "over_arch.model.0._mlp.٣._linear.weight",
    ]
)


@fuzzed
@given(changes=st.dictionaries(names, st.none() | st.tuples(shapes, kinds), max_size=4), wrapper=st.booleans())
def test_a_checkpoint_may_hold_any_tensors(
    tmp_path: Path, changes: dict[str, tuple[tuple[int, ...], Any] | None], wrapper: bool
) -> None:
    state: dict[str, Any] = {name: torch.from_numpy(array) for name, array in random_weights(TINY).items()}
    for name, change in changes.items():
        if change is None:
            state.pop(name, None)
        else:
            state[name] = torch.zeros(change[0], dtype=change[1])
    save(tmp_path / "trained.pt", {"state_dict": state} if wrapper else state)
    refused(lambda: load_checkpoint(tmp_path / "trained.pt"))
    save(tmp_path / "trained.safetensors", state)
    refused(lambda: load_checkpoint(tmp_path / "trained.safetensors"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: [1, 2],
        dict,
        lambda: {5: torch.zeros(1)},
        lambda: {table_key("t_a"): torch.zeros(3, 4).to_sparse()},
        lambda: {table_key("t_a"): torch.zeros(3, 4, device="meta")},
        lambda: {table_key("t_a"): torch.quantize_per_tensor(torch.zeros(3, 4), 0.1, 0, torch.qint8)},
        lambda: {table_key("t_a"): torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)])},
    ],
    ids=["a list", "nothing", "numbered", "sparse", "meta", "quantized", "nested"],
)
def test_tensors_that_are_no_plain_arrays_are_refused(tmp_path: Path, make: Callable[[], Any]) -> None:
    torch.save(make(), tmp_path / "trained.pt")
    assert refused(lambda: load_checkpoint(tmp_path / "trained.pt")) is not None


# -- calibration -------------------------------------------------------------------------------------------------------

SCHEMA = small().schema


@fuzzed
@given(data=st.data(), compressed=st.booleans())
def test_a_calibration_file_may_be_any_bytes(tmp_path: Path, data: st.DataObject, compressed: bool) -> None:
    file = tmp_path / "rows.npz"
    (np.savez_compressed if compressed else np.savez)(
        file, dense=np.zeros((2, 5), np.float32), ids=np.zeros((2, 4), np.int32), labels=np.zeros(2)
    )
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    refused(lambda: load_calibration(file, SCHEMA))


NAMES = ("ids", "lengths", "values", "weights", "labels")
dtypes = st.sampled_from(["f4", "f8", "f2", "i4", "i8", "u8", "?", "c8", "U3", "S2", "M8[s]", "m8[s]", "V3", "i4,f4"])
arrays = st.tuples(st.lists(st.integers(0, 5), max_size=3).map(tuple), dtypes)


@fuzzed
@given(
    changes=st.dictionaries(st.sampled_from(["dense", *NAMES, "more"]), arrays, min_size=1, max_size=3),
    bags=st.booleans(),
)
def test_a_calibration_file_may_hold_any_arrays(
    tmp_path: Path, changes: dict[str, tuple[tuple[int, ...], str]], bags: bool
) -> None:
    held: dict[str, Any] = {"dense": np.zeros((2, 5), np.float32)}
    if bags:
        held |= {"lengths": np.full((2, 4), 2), "values": np.zeros(16, np.int32)}
    else:
        held |= {"ids": np.zeros((2, 4), np.int32)}
    held |= {name: np.zeros(shape, dtype) for name, (shape, dtype) in changes.items()}
    np.savez(tmp_path / "rows.npz", **held)
    refused(lambda: load_calibration(tmp_path / "rows.npz", SCHEMA))
