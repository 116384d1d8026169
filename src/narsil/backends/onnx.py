"""Runs the ONNX graph through ONNX Runtime (backend name "onnx"). Needs no torch.

Receives an Artifact; owns the session, which all instances from ``share`` use together: its run is thread-safe,
releases the GIL and, with one intra-op thread, computes in the caller's thread.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime

from narsil.artifacts.artifact import ONNX_SCHEMA, Artifact
from narsil.artifacts.onnx_weights import check_graph
from narsil.artifacts.schema import ModelSchema
from narsil.backends.base import Backend
from narsil.dataflow import Batch, Scores
from narsil.errors import ArtifactError, DeviceUnavailable, first_line

__all__ = ["OnnxBackend"]

_INPUTS = {"float_features", "id_list_features.lengths", "id_list_features.values"}


class OnnxBackend(Backend):
    """An ONNX Runtime session on the CPU."""

    name = "onnx"

    def __init__(self, session: Any, schema: ModelSchema) -> None:
        self.schema = schema
        self.device = "cpu"
        self._session = session

    @classmethod
    def load(
        cls, artifact: Artifact, device: str = "cpu", intra_op_threads: int = 1, *, copy_tables: bool = False
    ) -> OnnxBackend:
        """Opens the graph. Raises ArtifactError where it is damaged or differs from the artifact's schema.

        ``copy_tables`` reads the tables into memory of the session's own instead of mapping their file.
        """
        files = artifact.files_for("onnx")
        graph = files["onnx"]
        if device != "cpu":
            raise DeviceUnavailable(f"the onnx backend runs on the cpu, not on {device}; use --backend torch")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = intra_op_threads
        options.inter_op_num_threads = 1
        options.enable_mem_pattern = False  # plans are kept per input shape, and batches come in every shape
        options.log_severity_level = 3
        # A spinning pool would burn the cores that other lanes compute on.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        if copy_tables and "onnx_data" in files:
            tables = np.memmap(files["onnx_data"], np.uint8, mode="r")
            options.add_external_initializers_from_files_in_memory([files["onnx_data"].name], [tables], [tables.size])
        try:
            session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise ArtifactError(f"{graph} cannot be loaded: {first_line(error)}") from None
        _check_interface(session, artifact)
        check_graph(graph, files.get("onnx_data"), artifact.schema)
        return cls(session, artifact.schema)

    def run(self, batch: Batch) -> Scores:
        """As Backend.run."""
        outputs = self.schema.outputs
        scores = self._session.run(
            list(outputs),
            {
                "float_features": batch.dense,
                "id_list_features.lengths": batch.lengths,
                "id_list_features.values": batch.values.astype(self.schema.id_dtype, copy=False),
            },
        )
        for (task, width), array in zip(outputs.items(), scores, strict=True):
            shape = (batch.rows,) if width == 1 else (batch.rows, width)
            if array.shape != shape or array.dtype != np.float32:
                raise ArtifactError(
                    f"the model returned {task} as {array.dtype} of shape {array.shape} for {batch.rows} rows"
                )
        return dict(zip(outputs, scores, strict=True))

    def share(self) -> OnnxBackend:
        """Another instance over the same session."""
        return OnnxBackend(self._session, self.schema)


def _check_interface(session: Any, artifact: Artifact) -> None:
    inputs = {value.name: value for value in session.get_inputs()}
    outputs = {value.name for value in session.get_outputs()}
    if set(inputs) != _INPUTS or not set(artifact.schema.tasks) <= outputs:
        raise ArtifactError(
            f"{artifact.onnx} takes {', '.join(sorted(inputs))} and returns {', '.join(sorted(outputs))}, which does "
            "not fit its manifest; package the model again"
        )
    # The graph adds a table's first row to each id: with row counts other than its own, ids of one table would read
    # another's rows.
    try:
        built_for = json.loads(session.get_modelmeta().custom_metadata_map.get(ONNX_SCHEMA, "null"))
    except (ValueError, RecursionError):
        built_for = None
    if built_for != artifact.schema.to_dict():
        raise ArtifactError(
            f"{artifact.onnx} was built for another schema than its manifest's; package the model again"
        )
