"""Packages a DLRM: FP32 weights in, an artifact's folder out.

Receives a DlrmConfig and its weights; writes model_default.pt (INT8 tables, TorchRec's interface), the ONNX graph
with its tables, and the manifest. Owns the quantization.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from narsil.artifacts import artifact as artifacts
from narsil.artifacts.artifact import Artifact
from narsil.artifacts.finite import FP16_MOST, first_bad_scale
from narsil.artifacts.replacing import Progress, check_out, replacing
from narsil.dataflow import Floats
from narsil.errors import ArtifactError, ConfigError, DeviceUnavailable
from narsil.names import is_name
from narsil.packaging.dlrm import DlrmConfig, DlrmWeights, check_weights, table_key

if TYPE_CHECKING:
    from narsil.packaging.deviation import Int8Deviation

__all__ = ["check_device", "check_request", "package_dlrm", "quantized_module"]


def package_dlrm(
    config: DlrmConfig,
    weights: DlrmWeights,
    out: str | Path,
    *,
    device: str = "cpu",
    name: str = "dlrm",
    version: str = "1",
    origin: str | None = None,
    onnx: bool | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Writes the artifact to the folder ``out`` and opens it.

    ``origin`` says in the manifest where the weights came from (none: random, from the config's seed). ``onnx``
    writes the ONNX graph too; None does so where the onnx package is installed.

    Raises ArtifactError for weights that do not fit, and what check_request raises. ``out`` is then what it was.
    """
    report = progress or (lambda stage, done, total: None)
    out = Path(out)
    check_request(out, device=device, name=name, version=version, onnx=onnx)
    check_weights(config, weights)
    with replacing(out) as staging:
        files, deviation = _write_models(config, weights, staging, device, onnx, report)
        report("manifest", 0, 1)
        artifacts.write_manifest(
            staging,
            name=name,
            version=version,
            schema=config.schema,
            device=device,
            files=files,
            architecture={"kind": "dlrm", **config.to_dict(), "origin": origin or f"random, seed {config.seed}"},
            quantization={"tables": "int8", **asdict(deviation)},
        )
        report("manifest", 1, 1)
    return artifacts.open_artifact(out, verify=False)


def _write_models(
    config: DlrmConfig, weights: DlrmWeights, folder: Path, device: str, onnx: bool | None, report: Progress
) -> tuple[dict[str, Path], Int8Deviation]:
    """Writes the model's files. Returns role -> path, and what INT8 tables do to its scores."""
    from narsil.packaging.deviation import deviation_of_int8

    files = {"torchscript": folder / artifacts.TORCHSCRIPT_FILE}
    module = quantized_module(config, weights, device, report)
    report("compare", 0, 1)
    deviation = deviation_of_int8(config, weights, module)
    report("compare", 1, 1)
    _save_torchscript(module, files["torchscript"], report)
    if onnx or (onnx is None and find_spec("onnx") is not None):
        from narsil.packaging.onnx_export import export_onnx

        files |= export_onnx(config, weights, folder, lambda done, total: report("onnx", done, total))
    return files, deviation


def check_request(out: Path, *, device: str, name: str, version: str, onnx: bool | None) -> None:
    """What can be refused before there are any weights.

    Raises ArtifactError for an ``out`` that holds other files or cannot be written to, DeviceUnavailable where
    ``device`` is not on this machine, ConfigError for a name or version that requests could not give, and where onnx
    is asked for and not installed.
    """
    for label, value in (("name", name), ("version", version)):
        if not is_name(value):
            raise ConfigError(f"{label} must be made of 1 to 256 letters, digits and _.-/:, not {value[:64]!r}")
    check_device(device)
    if onnx and find_spec("onnx") is None:
        raise ConfigError("writing ONNX needs the onnx package: install narsil[onnx] or pass --no-onnx")
    check_out(out)


def check_device(device: str) -> None:
    """Raises ConfigError unless it is cpu, cuda or cuda:N, and DeviceUnavailable unless this machine has it."""
    kind, _, number = device.partition(":")
    if (kind == "cpu" and device != "cpu") or kind not in ("cpu", "cuda") or (":" in device and not number.isdecimal()):
        raise ConfigError(f"device must be cpu, cuda or cuda:N, not {device!r}")
    if kind == "cpu":
        return
    try:
        import torch
    except ImportError:
        raise DeviceUnavailable(f"{device} needs torch with CUDA: install narsil[cuda]") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        raise DeviceUnavailable(
            f"{device} is not on this machine, where torch {torch.__version__} sees {count} CUDA devices; "
            "use --device cpu, or install narsil[cuda] on a machine with that GPU"
        )


def quantized_module(config: DlrmConfig, weights: DlrmWeights, device: str, report: Progress | None = None) -> Any:
    """The scripted module that model_default.pt holds, on ``device``."""
    import torch

    from narsil.packaging.modules import PredictModule, load_weights

    tbe = _quantized_tables(config, weights, device, report or (lambda stage, done, total: None))
    module = PredictModule(config, tbe, device)
    load_weights(module._module, weights)
    module = module.to(device).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is TorchRec's format all the same
        return torch.jit.script(module)


def _quantized_tables(config: DlrmConfig, weights: DlrmWeights, device: str, report: Progress) -> Any:
    """FBGEMM's fused operator over the T tables, filled table by table."""
    import torch
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
        BoundsCheckMode,
        EmbeddingLocation,
        PoolingMode,
    )
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    from narsil.packaging.modules import as_tensor

    on_cpu = device == "cpu"
    location = EmbeddingLocation.HOST if on_cpu else EmbeddingLocation.DEVICE
    tbe = IntNBitTableBatchedEmbeddingBagsCodegen(
        [
            (table, rows, config.dim, SparseType.INT8, location)
            for table, rows in zip(config.names_of_tables, config.rows_per_table, strict=True)
        ],
        pooling_mode=PoolingMode.SUM if config.pooling == "sum" else PoolingMode.MEAN,
        device=torch.device(device),
        bounds_check_mode=BoundsCheckMode.NONE,  # ids are checked when a request is admitted
        output_dtype=SparseType.FP32,
        row_alignment=1 if on_cpu else 16,
        feature_names_per_table=[[feature] for feature in config.names_of_features],
    )
    tbe.initialize_weights()
    for number, (table, target) in enumerate(zip(config.names_of_tables, tbe.split_embedding_weights(), strict=True)):
        report("quantize", number, config.tables)
        source = as_tensor(weights[table_key(table)])
        # (rows, dim + 4): FBGEMM's quantizer puts scale and bias last, its lookup wants them apart.
        rows = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(source, 8)
        _check_quantized(rows[:, -4:].numpy(), source.numpy(), table)
        target[0].copy_(rows[:, :-4])
        target[1].copy_(rows[:, -4:])
    report("quantize", config.tables, config.tables)
    return tbe


def _check_quantized(scale_bias: NDArray[np.uint8], source: Floats, table: str) -> None:
    """Raises ArtifactError where a row's smallest weight, or the step between its 256 levels, is beyond FP16."""
    bad = first_bad_scale(scale_bias)
    if bad is None:
        return
    low, high = float(source[bad].min()), float(source[bad].max())
    raise ArtifactError(
        f"table {table}: row {bad} holds weights from {low:.6g} to {high:.6g}, which INT8 rows cannot: their scale and "
        f"bias are FP16, of at most {FP16_MOST:.0f}. Such a row has rarely been trained well: bound the embeddings "
        "when training (weight decay, clipping), or mend the row in the checkpoint, and package it again"
    )


def _save_torchscript(module: Any, path: Path, report: Progress) -> None:
    report("torchscript", 0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module.save(str(path))
    report("torchscript", 1, 1)
