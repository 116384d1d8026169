"""Exported programs and TorchScript of several arguments: scores equal to a direct call, alone and fused."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from narsil.artifacts.artifact import open_artifact
from narsil.artifacts.exported import load_exported
from narsil.backends.registry import load_backend
from narsil.dataflow import Batch
from narsil.engine.independence import dependence
from narsil.errors import ArtifactError, ForwardFailed

torchrec = pytest.importorskip("torchrec")

NAMES, ROWS, DIM, DENSE = ("a", "b", "c"), (50, 60, 70), 8, 4
AUTO = torch.export.Dim.AUTO


class FlatTorchRec(nn.Module):
    """An EmbeddingBagCollection over flattened inputs."""

    def __init__(self) -> None:
        super().__init__()
        tables = [
            torchrec.EmbeddingBagConfig(num_embeddings=rows, embedding_dim=DIM, name="t_" + name, feature_names=[name])
            for name, rows in zip(NAMES, ROWS, strict=True)
        ]
        self.bags = torchrec.EmbeddingBagCollection(tables=tables)
        self.over = nn.Linear(DENSE + 3 * DIM, 1)

    def forward(self, float_features: Any, values: Any, lengths: Any) -> Any:
        ids = torchrec.KeyedJaggedTensor(keys=list(NAMES), values=values, lengths=lengths)
        return torch.sigmoid(self.over(torch.cat([float_features, self.bags(ids).values()], 1))).squeeze(1)


class DictTorchRec(FlatTorchRec):
    def forward(self, batch: Any) -> Any:  # type: ignore[override]
        return {"ctr": super().forward(batch["dense"], batch["values"], batch["lengths"])}


class Dlrm(nn.Module):
    """Inputs as facebookresearch/dlrm lays them out."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, DIM, mode="sum") for rows in ROWS)
        self.over = nn.Linear(DENSE + 3 * DIM, 1)

    def forward(self, dense_x: torch.Tensor, lS_o: torch.Tensor, lS_i: list[torch.Tensor]) -> torch.Tensor:
        found = [dense_x]
        for number, table in enumerate(self.tables):
            found.append(table(lS_i[number], lS_o[number]))
        return torch.sigmoid(self.over(torch.cat(found, 1)))


def batch_of(rows: int, lengths: Any = None) -> Batch:
    random = np.random.default_rng(rows)
    lengths = random.integers(0, 5, (3, rows)).astype(np.int32) if lengths is None else lengths
    ids = [random.integers(0, count, int(own.sum())) for count, own in zip(ROWS, lengths, strict=True)]
    dense = random.standard_normal((rows, DENSE)).astype(np.float32)
    return Batch(rows, dense, lengths.ravel(), np.concatenate(ids).astype(np.int32), one_hot=False)


def by_feature(batch: Batch) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    lengths = batch.lengths.reshape(3, -1)
    ids = np.split(batch.values.astype(np.int64), np.cumsum(lengths.sum(axis=1))[:-1])
    offsets = [torch.from_numpy(np.cumsum(own) - own).long() for own in lengths]
    return offsets, [torch.from_numpy(own) for own in ids]


def flat_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.from_numpy(batch.dense), torch.from_numpy(batch.values), torch.from_numpy(batch.lengths)


def write_schema(file: Path, inputs: list[dict[str, Any]], task: str = "default", **other: Any) -> None:
    features = [
        {"name": name, "table": "t_" + name, "rows": rows, "dim": DIM} for name, rows in zip(NAMES, ROWS, strict=True)
    ]
    content = {"format": "narsil.schema/1", "dense_dim": DENSE, "features": features, "tasks": [task], "inputs": inputs}
    file.with_suffix(".schema.json").write_text(json.dumps({**content, **other}))


def flat_inputs(prefix: str = "", dense: str = "float_features") -> list[dict[str, Any]]:
    return [
        {"name": prefix + dense, "holds": "dense"},
        {"name": prefix + "values", "holds": "ids", "type": "int32"},
        {"name": prefix + "lengths", "holds": "lengths", "type": "int32"},
    ]


def flat(folder: Path) -> tuple[Path, Callable[[Batch], Any]]:
    torch.manual_seed(0)
    model, file = FlatTorchRec().eval(), folder / "flat.pt2"
    every = ({0: AUTO}, {0: AUTO}, {0: AUTO})
    torch.export.save(torch.export.export(model, flat_of(batch_of(6)), dynamic_shapes=every, strict=False), file)
    write_schema(file, flat_inputs())
    return file, lambda batch: model(*flat_of(batch))


def named(folder: Path) -> tuple[Path, Callable[[Batch], Any]]:
    torch.manual_seed(0)
    model, file = DictTorchRec().eval(), folder / "named.pt2"

    def given(batch: Batch) -> dict[str, torch.Tensor]:
        return dict(zip(("dense", "values", "lengths"), flat_of(batch), strict=True))

    every = ({name: {0: AUTO} for name in ("dense", "values", "lengths")},)
    torch.export.save(torch.export.export(model, (given(batch_of(6)),), dynamic_shapes=every, strict=False), file)
    write_schema(file, flat_inputs("batch_", "dense"), "ctr")
    return file, lambda batch: model(given(batch))["ctr"]


def dlrm_inputs(scripted: bool) -> list[dict[str, Any]]:
    first = [
        {"name": "dense_x", "holds": "dense"},
        {"name": "lS_o" if scripted else "ls_o", "holds": "offsets", "layout": "by_feature"},
    ]
    if scripted:
        return [*first, {"name": "lS_i", "holds": "ids", "layout": "list"}]
    return [*first, *({"name": f"ls_i_{at}", "holds": "ids", "features": [name]} for at, name in enumerate(NAMES))]


def exported_dlrm(folder: Path) -> tuple[Path, Callable[[Batch], Any]]:
    torch.manual_seed(0)
    model, file = Dlrm().eval(), folder / "dlrm.pt2"
    batch = batch_of(6)
    offsets, ids = by_feature(batch)
    every = ({0: AUTO}, {1: AUTO}, [{0: AUTO}] * 3)
    given = (torch.from_numpy(batch.dense), torch.stack(offsets), ids)
    torch.export.save(torch.export.export(model, given, dynamic_shapes=every, strict=False), file)
    write_schema(file, dlrm_inputs(scripted=False))
    return file, lambda batch: model(torch.from_numpy(batch.dense), *by_feature(batch)).squeeze(1)


def scripted_dlrm(folder: Path) -> tuple[Path, Callable[[Batch], Any]]:
    torch.manual_seed(0)
    model, file = Dlrm().eval(), folder / "dlrm.pt"
    torch.jit.script(model).save(str(file))
    write_schema(file, dlrm_inputs(scripted=True))

    def direct(batch: Batch) -> Any:
        offsets, ids = by_feature(batch)
        return model(torch.from_numpy(batch.dense), torch.stack(offsets), ids).squeeze(1)

    return file, direct


@pytest.mark.parametrize("make", [flat, named, exported_dlrm, scripted_dlrm])
def test_scores_are_those_of_a_direct_call(tmp_path: Path, make: Any) -> None:
    file, direct = make(tmp_path)
    backend = load_backend(open_artifact(file))
    (task,) = backend.schema.tasks
    for rows in (2, 5, 64, 300):
        batch = batch_of(rows)
        with torch.inference_mode():
            assert np.array_equal(backend.run(batch)[task], direct(batch).numpy()), rows
    nothing = batch_of(4, np.zeros((3, 4), np.int32))
    assert np.array_equal(backend.share().run(nothing)[task], direct(nothing).detach().numpy())


def test_every_lane_gives_the_tasks_that_were_picked(tmp_path: Path) -> None:
    backend = load_backend(open_artifact(flat(tmp_path)[0]))
    backend.schema = backend.schema.picking(backend.schema.tasks)
    assert backend.share().schema is backend.schema
    assert backend.share().share().schema is backend.schema


class Centred(FlatTorchRec):
    """Whose scores depend on their company."""

    def forward(self, *given: Any) -> Any:
        scores = super().forward(*given)
        return scores - scores.mean()


def exported_for_two(model: nn.Module, folder: Path) -> Path:
    file = folder / "two.pt2"
    every = ({0: AUTO}, {0: AUTO}, {0: AUTO})
    given = (every,) if isinstance(model, Centred) else every
    torch.export.save(torch.export.export(model.eval(), flat_of(batch_of(6)), dynamic_shapes=given, strict=False), file)
    names = [*load_exported(file).names]
    write_schema(file, [{**item, "name": name} for item, name in zip(flat_inputs(), names, strict=True)])
    return file


def test_a_lone_row_runs_where_it_scores_as_in_company(tmp_path: Path) -> None:
    backend = load_backend(open_artifact(exported_for_two(FlatTorchRec(), tmp_path)))
    assert load_exported(tmp_path / "two.pt2").sizes["float_features"][0] == (2, None)
    assert backend.bucket(1) == 1
    assert backend.run(batch_of(1))["default"].shape == (1,)
    assert dependence(backend) is None


def test_a_lone_row_is_refused_where_the_program_was_not_made_for_it(tmp_path: Path) -> None:
    backend = load_backend(open_artifact(exported_for_two(Centred(), tmp_path)))
    assert [backend.bucket(rows) for rows in (1, 2, 3)] == [2, 2, 3]
    with pytest.raises(ForwardFailed, match="at least 2 rows"):
        backend.run(batch_of(1))


def test_a_folder_with_one_program_opens(tmp_path: Path) -> None:
    scripted_dlrm(tmp_path)
    (tmp_path / "dlrm.schema.json").rename(tmp_path / "schema.json")
    assert open_artifact(tmp_path).schema.num_features == 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tasks": ["other"]}, "it returns default where the schema file has the tasks other"),
        ({"widths": [2]}, "must have 2 numbers"),
        ({"dense_dim": 5}, "differ: on rows of first ids"),
    ],
)
def test_what_the_model_does_otherwise_is_told(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    file, _ = exported_dlrm(tmp_path)
    write_schema(file, dlrm_inputs(scripted=False), **change)
    with pytest.raises(ArtifactError, match=told):
        load_backend(open_artifact(file))


@pytest.mark.parametrize("make", [flat, exported_dlrm, scripted_dlrm])
def test_ids_beyond_a_table_are_told(tmp_path: Path, make: Any) -> None:
    file, _ = make(tmp_path)
    path = file.with_suffix(".schema.json")
    path.write_text(path.read_text().replace('"rows": 70', '"rows": 71'))
    with pytest.raises(
        ArtifactError, match="lets ids of c up to 70 in, and the model leads those from 70 on outside of a table of 70"
    ):
        load_backend(open_artifact(file))


def test_other_names_are_told(tmp_path: Path) -> None:
    file, _ = exported_dlrm(tmp_path)
    write_schema(file, dlrm_inputs(scripted=True))
    with pytest.raises(ArtifactError, match="they differ in"):
        load_backend(open_artifact(file))


def test_an_export_of_fixed_rows_is_refused_with_the_way_out(tmp_path: Path) -> None:
    batch, file = batch_of(6), tmp_path / "fixed.pt2"
    offsets, ids = by_feature(batch)
    given = (torch.from_numpy(batch.dense), torch.stack(offsets), ids)
    torch.export.save(torch.export.export(Dlrm().eval(), given), file)
    write_schema(file, dlrm_inputs(scripted=False))
    with pytest.raises(ArtifactError, match=r"6 to 6 entries of dense_x.*dynamic_shapes"):
        load_backend(open_artifact(file))


def test_a_program_without_a_schema_file_says_what_to_write(tmp_path: Path) -> None:
    file, _ = exported_dlrm(tmp_path)
    file.with_suffix(".schema.json").unlink()
    with pytest.raises(ArtifactError, match=r"dlrm\.schema\.json"):
        open_artifact(file)


def rewritten(file: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """The archive with its records changed."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    other = file.with_name("other.pt2")
    with zipfile.ZipFile(other, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))
    return other


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (b"torch.ops.aten.cat.default", b"torch.os.system", "calls torch.os.system"),
        (b"torch.ops.aten.cat.default", b"torch.ops.aten.from_file", "calls torch.ops.aten.from_file"),
        (b'"use_pickle": false', b'"use_pickle": true', "stored as a pickle"),
        (b'"expr_str": "', b'"expr_str": "exit() or ', "a size is no expression"),
        (b'"expr_str": "', b'"expr_str": "9**9**9 + ', "a size is no expression"),
        (b'"expr_str": "', b'"expr_str": "().__class__ < ', "a size is no expression"),
    ],
)
def test_what_would_run_when_it_is_loaded_is_refused(tmp_path: Path, old: bytes, new: bytes, told: str) -> None:
    file, _ = exported_dlrm(tmp_path)
    other = rewritten(file, lambda name, data: data.replace(old, new))
    with pytest.raises(ArtifactError, match=told):
        load_exported(other)


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


def test_sample_inputs_are_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file, _ = exported_dlrm(tmp_path)
    pickled = io.BytesIO()
    torch.save((Bomb(),), pickled)
    load_exported(rewritten(file, lambda name, data: pickled.getvalue() if "sample_inputs" in name else data))
    assert not Path("exploded").exists()


def test_truncated_programs_are_refused(tmp_path: Path) -> None:
    file, _ = exported_dlrm(tmp_path)
    whole = file.read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ArtifactError):
            load_exported(file)
