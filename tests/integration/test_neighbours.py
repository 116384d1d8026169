"""The client in one fresh environment with tritonclient, whose pins of grpcio and protobuf are its own.

Needs a package index; without one it is skipped. The environments hold what pip chooses there, and no native code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import engine_with, grpc_server, one_hot, scores_alone

ROOT = Path(__file__).parents[2]

# What both clients do in one process. Narsil answers Triton's ServerMetadata, by tritonclient's own messages.
SCRIPT = """
import json, sys
import numpy as np, google.protobuf, grpc
import tritonclient.grpc, narsil
from narsil.transports.reflection import Reflection

target, rows = sys.argv[1], json.loads(sys.argv[2])
with narsil.Client(target) as client:
    prediction = client.predict(np.array(rows["dense"], np.float32), np.array(rows["ids"], np.int32))
    name = client.model().name
try:
    tritonclient.grpc.InferenceServerClient(target).get_server_metadata()
    answer = "OK"
except tritonclient.grpc.InferenceServerException as error:
    answer = error.status()
print(json.dumps({
    "scores": prediction.scores["default"].tolist(), "name": name, "triton": answer,
    "services": Reflection().answer(b"\\x3a\\x00").count(b"grpc."), "home": narsil.__file__,
    "grpcio": grpc.__version__, "protobuf": google.protobuf.__version__,
}))
"""


def lowest(package: str) -> str:
    """The version that pyproject.toml promises at least."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (bound,) = (match[1] for one in found if (match := re.fullmatch(rf"{package}>=([\d.]+)", one)))
    return bound


NEIGHBOURS = {
    "newest": ["tritonclient[grpc]"],
    "oldest": ["tritonclient[grpc]==2.66.0", f"grpcio=={lowest('grpcio')}"],
}


def pip(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "BUILD_NATIVE": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-m", "pip", *arguments, "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=150, check=False, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """This checkout's, built of a copy of its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    if pip("download", "--no-deps", "--dest", str(folder / "probe"), "tritonclient").returncode:
        pytest.skip("no package index to install tritonclient from")
    source = folder / "source"
    built = shutil.ignore_patterns("*.so", "descriptors.binpb", "__pycache__", "*.egg-info")
    for part in ("src", "proto", "csrc"):
        shutil.copytree(ROOT / part, source / part, ignore=built)
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / file, source)
    made = pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    assert made.returncode == 0, made.stderr
    (path,) = folder.glob("narsil-*.whl")
    return path


@pytest.fixture(scope="module")
def environments(wheel, tmp_path_factory) -> Iterator[dict[str, Future[Path]]]:
    """A Python of each kind of neighbourhood, all installed at once."""

    def make(beside: list[str]) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
        python = folder / "bin" / "python"
        installed = pip("--python", str(python), "install", "--no-compile", str(wheel), *beside)
        assert installed.returncode == 0, installed.stderr
        return python

    with ThreadPoolExecutor() as pool:
        yield {name: pool.submit(make, beside) for name, beside in NEIGHBOURS.items()}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_it_is_installed_beside_tritonclient_and_both_work(environments, name, tmp_path):
    python = environments[name].result()
    features = one_hot(7, 3)
    rows = json.dumps({"dense": features.dense.tolist(), "ids": features.sparse.ids.T.tolist()})
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with engine_with() as engine, grpc_server(engine) as address:
        found = subprocess.run(
            [str(python), "-c", SCRIPT, address, rows],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert found.returncode == 0, found.stderr
    said = json.loads(found.stdout)
    np.testing.assert_array_equal(np.array(said["scores"], np.float32), scores_alone(features))
    assert (said["name"], said["triton"], said["services"]) == ("fake", "OK", 2)
    assert Path(said["home"]).is_relative_to(python.parents[1])  # the wheel, not this checkout
    assert int(said["protobuf"].partition(".")[0]) < 7  # what tritonclient pins
