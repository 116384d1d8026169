"""AOTInductor packages: scores equal to a direct call, alone and fused; lies and foreign machines are told."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from narsil.artifacts.artifact import open_artifact
from narsil.artifacts.pt2 import check_layout, is_package
from narsil.backends.aoti import Library
from narsil.backends.packages import load_packaged
from narsil.backends.registry import load_backend
from narsil.compile.compiler import compile_artifact
from narsil.engine.independence import dependence
from narsil.errors import ArtifactError
from tests.fixtures_compiled import needs_compiler
from tests.integration.test_exports import (
    AUTO,
    DictTorchRec,
    Dlrm,
    batch_of,
    by_feature,
    dlrm_inputs,
    flat_inputs,
    flat_of,
    write_schema,
)

pytestmark = needs_compiler


def packaged(model: torch.nn.Module, given: tuple[Any, ...], sizes: Any, file: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own compiler
        exported = torch.export.export(model, given, dynamic_shapes=sizes, strict=False)
        torch._inductor.aoti_compile_and_package(exported, package_path=str(file))
    return file


@pytest.fixture(scope="module")
def torchrec_package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[Any], Any]]:
    """A TorchRec model that takes and returns dicts."""
    torch.manual_seed(0)
    model, names = DictTorchRec().eval(), ("dense", "values", "lengths")

    def given(batch: Any) -> dict[str, torch.Tensor]:
        return dict(zip(names, flat_of(batch), strict=True))

    sizes = ({name: {0: AUTO} for name in names},)
    file = packaged(model, (given(batch_of(6)),), sizes, tmp_path_factory.mktemp("packages") / "torchrec.pt2")
    return file, lambda batch: model(given(batch))["ctr"]


@pytest.fixture(scope="module")
def dlrm_package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[[Any], Any]]:
    """A plain model with a list of tensors among its arguments."""
    torch.manual_seed(0)
    model, batch = Dlrm().eval(), batch_of(6)
    offsets, ids = by_feature(batch)
    sizes = ({0: AUTO}, {1: AUTO}, [{0: AUTO}] * 3)
    given = (torch.from_numpy(batch.dense), torch.stack(offsets), ids)
    file = packaged(model, given, sizes, tmp_path_factory.mktemp("packages") / "dlrm.pt2")
    return file, lambda batch: model(torch.from_numpy(batch.dense), *by_feature(batch)).squeeze(1)


@pytest.fixture
def torchrec_file(torchrec_package: Any, tmp_path: Path) -> Path:
    """With its schema file."""
    file = Path(shutil.copy(torchrec_package[0], tmp_path))
    write_schema(file, flat_inputs(dense="dense"), "ctr")
    return file


@pytest.fixture
def dlrm_file(dlrm_package: Any, tmp_path: Path) -> Path:
    """With its schema file."""
    file = Path(shutil.copy(dlrm_package[0], tmp_path))
    write_schema(file, dlrm_inputs(scripted=False))
    return file


def assert_equal_scores(file: Path, direct: Callable[[Any], Any]) -> None:
    backend = load_backend(open_artifact(file))
    (task,) = backend.schema.tasks
    for instance in (backend, backend.share()):
        for rows in (1, 2, 5, 64, 300):
            batch = batch_of(rows)
            with torch.inference_mode():
                wanted = direct(batch).numpy()
            np.testing.assert_allclose(instance.run(batch)[task], wanted, rtol=2e-6, atol=1e-7)
    for lengths in ([[0] * 4] * 3, [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]):
        batch = batch_of(4, np.array(lengths, np.int32))
        with torch.inference_mode():
            wanted = direct(batch).numpy()
        np.testing.assert_allclose(backend.run(batch)[task], wanted, rtol=2e-6, atol=1e-7)
    assert [backend.bucket(rows) for rows in (1, 2)] == [1, 2]
    assert dependence(backend) is None
    backend.close()


def test_scores_of_a_torchrec_model(torchrec_package: Any, torchrec_file: Path) -> None:
    assert_equal_scores(torchrec_file, torchrec_package[1])


def test_scores_of_a_plain_model(dlrm_package: Any, dlrm_file: Path) -> None:
    assert_equal_scores(dlrm_file, dlrm_package[1])


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"type": "int32"', '"type": "int64"', "values unmatched dtype|values: unmatched dtype"),
        ('"dense_dim": 4', '"dense_dim": 5', "dense: unmatched dim value"),
        ('"rows": 70', '"rows": 75', "holds no table of 75 rows of 8 for the feature c"),
        ('"tasks": ["ctr"]', '"tasks": ["other"]', "returns ctr where the schema file has the tasks other"),
        ('"name": "values"', '"name": "lengths"', "two inputs share one name"),
        ('"name": "values"', '"name": "ids"', "takes values where its schema file has ids"),
    ],
)
def test_a_schema_file_that_lies_is_told(torchrec_file: Path, old: str, new: str, told: str) -> None:
    schema = torchrec_file.with_suffix(".schema.json")
    assert old in schema.read_text()
    schema.write_text(schema.read_text().replace(old, new))
    with pytest.raises(ArtifactError, match=told):
        load_backend(open_artifact(torchrec_file))


def test_ids_beyond_a_smaller_table_are_told(torchrec_file: Path) -> None:
    schema = torchrec_file.with_suffix(".schema.json")
    schema.write_text(schema.read_text().replace('"rows": 50', '"rows": 60'))
    with pytest.raises(ArtifactError, match="on rows of last ids, the compiled model failed: aoti_torch_cpu"):
        load_backend(open_artifact(torchrec_file))


def test_another_number_of_inputs_is_told(dlrm_file: Path) -> None:
    write_schema(dlrm_file, dlrm_inputs(scripted=True))
    with pytest.raises(ArtifactError, match="takes 5 tensors, its schema file has 3 inputs"):
        load_backend(open_artifact(dlrm_file))


def changed(
    file: Path, change: Callable[[str, bytes], bytes | None], more: Iterator[Any] | tuple[Any, ...] = ()
) -> Path:
    """The package with its records changed, or left out, and more of them."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            if (made := change(name, data)) is not None:
                archive.writestr(name, made)
        for name, data in more:
            archive.writestr(name, data)
    return file


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("AOTI_DEVICE_KEY", "cuda", "was compiled for cuda, and Narsil runs such packages on the CPU"),
        ("AOTI_MACHINE", "riscv64", "was compiled for riscv64 and this machine is"),
        ("AOTI_PLATFORM", "win32", "was compiled for win32 and this machine is linux"),
        ("AOTI_CPU_ISA", "AVX512 AMX_TILE", "was compiled for a processor with"),
    ],
)
def test_another_machines_code_is_told_and_not_loaded(
    torchrec_file: Path, key: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("narsil.artifacts.pt2.processor_flags", lambda: ("avx2", "fma"))
    monkeypatch.setattr("ctypes.CDLL", lambda path: pytest.fail("its code was loaded"))
    changed(
        torchrec_file,
        lambda name, data: (
            json.dumps({**json.loads(data), key: value}).encode() if name.endswith("metadata.json") else data
        ),
    )
    with pytest.raises(ArtifactError, match=told):
        load_backend(open_artifact(torchrec_file))


def test_what_torch_has_to_interpret_is_told(torchrec_file: Path) -> None:
    nodes = {"nodes": [{"node": {"target": "fbgemm::bounds_check_indices"}}]}
    changed(
        torchrec_file,
        lambda name, data: data,
        (("p/data/aotinductor/model/extern_kernel_nodes.json", json.dumps(nodes)),),
    )
    with pytest.raises(ArtifactError, match="calls fbgemm::bounds_check_indices, which AOTInductor has no code for"):
        load_backend(open_artifact(torchrec_file))


def test_code_that_cannot_be_loaded_is_told(torchrec_file: Path) -> None:
    file = changed(torchrec_file, lambda name, data: b"none" + data[4:] if name.endswith(".so") else data)
    with pytest.raises(ArtifactError, match="its code cannot be loaded"):
        load_backend(open_artifact(file))


def test_code_without_checks_is_told(torchrec_file: Path) -> None:
    file = changed(torchrec_file, lambda name, data: data.replace(b"unmatched dtype", b"unmatched dtipe"))
    with pytest.raises(ArtifactError, match="compiled without the checks of its inputs"):
        load_backend(open_artifact(file))


def test_a_package_without_its_library_is_told(torchrec_file: Path) -> None:
    changed(torchrec_file, lambda name, data: None if name.endswith(".so") else data)
    with pytest.raises(ArtifactError, match="holds 0 libraries where one is expected"):
        load_backend(open_artifact(torchrec_file))


def test_code_without_its_weights_is_told(torchrec_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = load_packaged(torchrec_file).weight_bytes()
    assert needed >= 4 * 8 * (50 + 60 + 70)
    monkeypatch.setattr(Library, "embedded", lambda library: needed - 1)
    with pytest.raises(ArtifactError, match="does not hold its weights in its code"):
        load_backend(open_artifact(torchrec_file))
    monkeypatch.setattr(Library, "embedded", lambda library: needed)
    load_backend(open_artifact(torchrec_file)).close()


def test_a_package_is_not_compiled_again(tmp_path: Path) -> None:
    file = archive(tmp_path, [("p/data/aotinductor/model/x.so", b"")])
    write_schema(file, flat_inputs())
    with pytest.raises(ArtifactError, match="is compiled already; serve it as it is"):
        compile_artifact(open_artifact(file), tmp_path / "out")


def test_nothing_stays_behind(torchrec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    packaged = load_packaged(torchrec_file)
    assert list(folder.iterdir()) == []
    packaged.close()


def archive(folder: Path, records: list[tuple[str, bytes]], kind: int = zipfile.ZIP_STORED) -> Path:
    file = folder / "odd.pt2"
    with zipfile.ZipFile(file, "w", kind) as made:
        made.writestr("p/archive_format", "pt2")
        for name, data in records:
            made.writestr(name, data)
    return file


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("../outside", "whose name leads elsewhere"),
        ("/etc/passwd", "whose name leads elsewhere"),
        ("p/./data", "whose name leads elsewhere"),
        ("p\\data", "whose name leads elsewhere"),
        ("P/Archive_Format", "twice"),
    ],
)
def test_names_that_readers_take_differently_are_refused(tmp_path: Path, name: str, told: str) -> None:
    file = archive(tmp_path, [(name, b"")])
    with pytest.raises(ArtifactError, match=told):
        check_layout(file)


def test_what_grows_when_it_is_read_is_refused(tmp_path: Path) -> None:
    file = archive(tmp_path, [("p/models/model.json", bytes(1 << 20))], zipfile.ZIP_DEFLATED)
    with pytest.raises(ArtifactError, match="compressed or encrypted"):
        check_layout(file)


def test_records_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    file = archive(tmp_path, [(f"p/data/{number}", bytes(1000)) for number in range(4)])
    data = bytearray(file.read_bytes())
    at = data.find(b"PK\x01\x02", data.find(b"PK\x01\x02") + 1)
    data[at + 20 : at + 28] = (2 * len(data)).to_bytes(4, "little") * 2  # both sizes of a record
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="records of more bytes than the file"):
        check_layout(file)


def test_a_program_beside_code_is_run_as_a_program(tmp_path: Path) -> None:
    file = archive(tmp_path, [("p/data/aotinductor/model/x.so", b""), ("p/models/model.json", b"{}")])
    assert not is_package(file)
    assert is_package(archive(tmp_path, [("p/data/aotinductor/model/x.so", b"")]))
