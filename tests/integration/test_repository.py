"""A real server of a folder of models: from the first version to the next one, by the command line."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
from click.testing import CliRunner

import narsil
from narsil.artifacts.artifact import Artifact
from narsil.backends.registry import load_backend
from narsil.bench.servers import narsil_server
from narsil.cli.models import command
from narsil.engine.collate import Collator
from tests.support import PATIENCE_S, one_hot


def models(address: str, *arguments: str) -> str:
    result = CliRunner().invoke(command, [*arguments, "--target", address])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_new_version_is_loaded_while_the_old_one_is_asked(small_artifact: Artifact, tmp_path: Path):
    root = tmp_path / "models"
    shutil.copytree(small_artifact.path, root / "ads" / "1")
    (root / "broken" / "1").mkdir(parents=True)
    (root / "broken" / "1" / "model_default.pt").write_bytes(b"nothing")
    (root / "ads" / "config.toml").write_text('backend = "torch"\n')
    rows = one_hot(5, schema=small_artifact.schema)
    backend = load_backend(small_artifact, "torch", tune_kernels=False)
    expected = np.array(backend.run(Collator(backend.schema).collate([rows]))["default"])
    stop, seen = threading.Event(), []

    with narsil_server(repository=root, model_control="explicit", lanes=2, tune_kernels=False) as server:
        address = server.address

        def ask() -> None:
            with narsil.Client(address) as client:
                while not stop.is_set():
                    found = client.predict(rows.dense, rows.sparse.ids.T, timeout=PATIENCE_S)
                    seen.append((found.model_version, np.abs(found.scores["default"] - expected).max()))

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            listed = {model["name"]: model for model in json.loads(models(address, "list", "--json"))}
            assert (listed["ads"]["state"], listed["broken"]["state"]) == ("READY", "UNAVAILABLE")
            assert "model_default.pt" in listed["broken"]["reason"]
            shutil.copytree(small_artifact.path, root / "ads" / "2")
            assert models(address, "load", "ads") == "ads is served in version 2\n"
            before = len(seen)
            while len(seen) < before + 3 and asking.is_alive():
                pass
        finally:
            stop.set()
            asking.join(PATIENCE_S)
        assert models(address, "unload", "ads") == "ads is no longer served\n"
        result = CliRunner().invoke(command, ["load", "none", "--target", address])
        assert isinstance(result.exception, narsil.errors.ModelNotFound)
    versions = [version for version, _ in seen]
    assert set(versions) == {"1", "2"}
    assert versions == sorted(versions)  # one step: no reply of the old one after one of the new
    assert max(deviation for _, deviation in seen) < 1e-5
