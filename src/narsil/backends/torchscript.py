"""Runs model_default.pt through TorchScript (backend name "torch").

Receives an Artifact and a device; owns the loaded module, which all instances from ``share`` use together: its
forward is thread-safe and runs without the GIL. On CUDA each instance has a stream of its own.
"""

from __future__ import annotations

import logging
from typing import Any

import fbgemm_gpu  # noqa: F401 - registers the operators that the module calls
import numpy as np
import torch
from numpy.typing import NDArray

from narsil.artifacts.artifact import Artifact
from narsil.artifacts.branches import branch_on_rows
from narsil.artifacts.schema import ModelSchema
from narsil.artifacts.torchrec import Binding, read_module
from narsil.artifacts.torchscript import LENGTHS, VALUES, WEIGHTS, forward_of, interface_of, load_torchscript
from narsil.backends.base import Backend
from narsil.backends.kernels import bucket, tune_linear_layers
from narsil.backends.outputs import scores_of
from narsil.dataflow import Batch, Scores
from narsil.errors import ArtifactError, first_line

__all__ = ["TorchScriptBackend"]

log = logging.getLogger(__name__)

_TORCHREC = Binding()  # the names that TorchRec's own predictors use


class TorchScriptBackend(Backend):
    """A ScriptModule that takes and returns named tensors."""

    name = "torch"

    def __init__(
        self,
        module: Any,
        schema: ModelSchema,
        device: str,
        intra_op_threads: int = 1,
        *,
        tuned: bool = False,
        binding: Binding = _TORCHREC,
        branch: str = "",
    ) -> None:
        self.schema = schema
        self.device = device
        self._module = module
        self._forward = forward_of(module, device)
        self._threads = intra_op_threads
        self._tuned = tuned
        self._binding = binding
        self.branch = branch
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    @classmethod
    def load(
        cls, artifact: Artifact, device: str, intra_op_threads: int = 1, *, tune: bool = True
    ) -> TorchScriptBackend:
        """Loads the artifact's module. Raises ArtifactError where it differs from the artifact's schema.

        ``tune`` lets linear layers run on the kernels that measure fastest here; False runs the module as it was saved,
        and so does True, with a warning, where the measurement fails.
        """
        script = artifact.files_for("torch")["torchscript"]
        module = load_torchscript(script, device)
        interface = interface_of(module, script.name)
        tuned = False
        # Before the first run: the executor keeps the graph that it saw then.
        if tune and torch.device(device).type == "cpu":
            try:
                tuned = tune_linear_layers(module, intra_op_threads)
            except Exception as error:  # of oneDNN or the executor; a speed-up that fails must not end the start
                log.warning("linear layers stay with torch's own kernels: oneDNN's failed (%s)", first_line(error))
                module = load_torchscript(script, device)  # without what the rewriting had begun
        # The manifest's row counts bound the ids that are let in: they must be the tables' own.
        reading = read_module(module, script.name, artifact.schema.given_widths, interface, artifact.schema.ids)
        if reading.schema != artifact.schema:
            raise ArtifactError(
                f"{script} and its manifest describe different models: "
                f"{_difference(reading.schema, artifact.schema)}; package the model again"
            )
        return cls(
            module,
            artifact.schema,
            device,
            intra_op_threads,
            tuned=tuned,
            binding=reading.binding,
            branch=branch_on_rows(module),
        )

    def bucket(self, rows: int) -> int:
        """See Backend.bucket."""
        return bucket(rows) if self._tuned else rows

    def run(self, batch: Batch) -> Scores:
        """As Backend.run; the inputs' memory is lent to torch, not copied."""
        inputs = self._inputs(batch)
        with torch.inference_mode():
            outputs = self._forward(inputs) if self._stream is None else self._run_on_stream(inputs, self._stream)
        return scores_of(outputs, self.schema.outputs, batch)

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        binding = self._binding
        wide, rows = binding.wide_ids, batch.rows
        matrices = (("float_features", batch.dense.shape[1]),) if binding.matrices is None else binding.matrices
        features = len(batch.lengths) // rows
        groups = (("id_list_features", features, False),) if binding.groups is None else binding.groups
        inputs, column, bag, first = {}, 0, 0, 0
        for key, width in matrices:
            # A part of the columns is not contiguous, and models may take views of it.
            part = batch.dense if width == batch.dense.shape[1] else batch.dense[:, column : column + width].copy()
            inputs[key] = _tensor(part)
            column += width
        for key, count, weighted in groups:
            lengths = batch.lengths[bag : bag + count * rows]
            last = len(batch.values) if len(groups) == 1 else first + int(lengths.sum(dtype=np.int64))
            values = batch.values[first:last]
            given = _tensor(lengths), _tensor(values)
            inputs[key + LENGTHS], inputs[key + VALUES] = (part.long() for part in given) if wide else given
            if weighted:
                # An id that comes without a weight weighs 1.
                weights = np.ones(len(values), np.float32) if batch.weights is None else batch.weights[first:last]
                inputs[key + WEIGHTS] = _tensor(weights)
            bag, first = bag + count * rows, last
        return inputs

    def _run_on_stream(self, inputs: dict[str, torch.Tensor], stream: torch.cuda.Stream) -> Any:
        with torch.cuda.stream(stream):
            on_device = {name: tensor.to(self._device, non_blocking=True) for name, tensor in inputs.items()}
            outputs = self._forward(on_device)
            # TorchRec's modules copy their scores back without waiting for the copy to end.
            stream.synchronize()
        return outputs

    def share(self) -> TorchScriptBackend:
        """Another instance over the same module."""
        return TorchScriptBackend(
            self._module,
            self.schema,
            self.device,
            self._threads,
            tuned=self._tuned,
            binding=self._binding,
            branch=self.branch,
        )

    def thread_setup(self) -> None:
        """Sets this thread's intra-op thread count: torch keeps it per thread."""
        torch.set_num_threads(self._threads)


class _Lent:
    """Presents read-only memory as writable, since torch warns of arrays that are not; the model only reads it."""

    def __init__(self, array: NDArray[Any]) -> None:
        interface = array.__array_interface__
        self.owner = array
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    if not array.flags.writeable:
        array = np.asarray(_Lent(array))
    return torch.from_numpy(array)


def _difference(actual: ModelSchema, claimed: ModelSchema) -> str:
    for ours, theirs in zip(actual.features, claimed.features, strict=False):
        if ours != theirs:
            return f"feature {ours.name} has {ours.rows} rows of {ours.dim}, the manifest says {theirs.name}, " + (
                f"{theirs.rows} of {theirs.dim}"
            )
    return (
        f"{actual.num_features} features, {actual.dense_dim} dense columns and tasks {', '.join(actual.tasks)} against "
        f"{claimed.num_features}, {claimed.dense_dim} and {', '.join(claimed.tasks)}"
    )
