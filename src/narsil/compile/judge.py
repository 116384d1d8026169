"""What `narsil compile` runs models with: it chooses the layers' precision, and holds the result against the artifact.

Receives artifacts and a calibration file's rows; produces a Plan and a Deviation. See planner.py and gate.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from narsil.artifacts.artifact import Artifact
from narsil.artifacts.compiled_info import CompiledInfo, Deviation
from narsil.backends.fused import Geometry, Library
from narsil.compile.calibration import Calibration
from narsil.compile.core import DlrmParts
from narsil.compile.gate import replay
from narsil.compile.planner import Plan, Workbench, choose

__all__ = ["ArtifactJudge"]


class ArtifactJudge:
    """Judges by the artifact's own scores, over random rows and a calibration file's."""

    def __init__(self, calibration: Calibration | None = None) -> None:
        self._calibration = calibration

    def choose(
        self, source: Artifact, info: CompiledInfo, parts: DlrmParts, library: Path, kinds: Sequence[str]
    ) -> Plan:
        """See models.compiler.Judge."""
        from narsil.backends.torchscript import TorchScriptBackend

        task = source.schema.tasks[0]
        reference = TorchScriptBackend.load(source, source.device, tune=False)
        bench = Workbench(
            Library(library),
            Geometry.of(info, source.schema),
            source.schema,
            parts,
            np.asarray(parts.lookup.weights),
            lambda batch: reference.run(batch)[task],
            self._calibration,
        )
        return choose(bench, info.precision, kinds, info.limit)

    def replay(self, source: Artifact, compiled: Artifact) -> Deviation:
        """See models.compiler.Judge."""
        return replay(source, compiled, self._calibration)
