"""What becomes of a server whose model's files are written to while it serves them."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from narsil.bench.servers import narsil_server
from narsil.client import Client
from tests.fixtures_compiled import needs_compiler, needs_fused
from tests.support import PATIENCE_S

pytestmark = [needs_compiler, needs_fused]


@pytest.fixture
def live(fused, tmp_path) -> Path:
    """A compiled folder that a test may write to."""
    shutil.copytree(fused.out, tmp_path / "live")
    return tmp_path / "live"


def test_tables_that_are_overwritten_in_place_end_the_server_with_a_reason(live):
    command = [sys.executable, "-m", "narsil", "serve", "--model", str(live), "--lanes", "1", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert "serving" in server.stdout.readline()
            with (live / "tables.bin").open("r+b") as file:
                file.write(b"\xff" * 4096)
            _, log = server.communicate(timeout=PATIENCE_S)
        finally:
            server.kill()
    assert server.returncode == 1
    assert "tables.bin has been overwritten in place while it is served" in log


def test_with_copied_tables_it_serves_on_with_the_scores_that_it_had(live):
    server = narsil_server(live, lanes=1, copy_tables=True)
    try:
        server.start()
        with Client(server.address) as client:
            schema = client.model(timeout=30).schema
            rows = np.zeros((3, schema.dense_dim), np.float32), np.zeros((3, schema.num_features), np.int64)
            before = client.predict(*rows, timeout=30).scores["default"]
            with (live / "tables.bin").open("r+b") as file:
                file.write(b"\xff" * 4096)
            np.testing.assert_array_equal(client.predict(*rows, timeout=30).scores["default"], before)
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
    finally:
        server.stop()
