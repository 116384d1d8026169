"""The part of a manifest that describes a compiled artifact, and what the machine must have to run it.

Receives plain values from manifest.json, which are hostile input; produces a CompiledInfo. Imports no torch.

    DIR/manifest.json      format narsil.compiled/1: all of narsil.artifact/1, and "compiled"
    DIR/tables.bin         INT8 tables as FBGEMM's lookup takes them, memory-mapped          role tables
    DIR/model_default.pt   the artifact it was compiled from: what runs where this cannot    role torchscript

and, by the engine that runs it:

    fused      DIR/forward.so     forward.cpp, built for this processor                      role compiled
               DIR/weights.bin    its layers' weights, packed and memory-mapped              role weights
    inductor   DIR/model.pt2      the model without its lookups, compiled by AOTInductor     role compiled
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from narsil.artifacts.packed import LayerShape
from narsil.artifacts.plan import Plan
from narsil.artifacts.schema import ModelSchema
from narsil.artifacts.whole import Whole
from narsil.errors import ArtifactError

__all__ = ["ENGINES", "CompiledInfo", "Deviation", "machine_problem", "processor_flags"]

# Of a processor's flags, those that compilers and oneDNN's kernels turn into instructions.
_INSTRUCTIONS = ("avx", "amx", "fma", "f16c", "bmi", "sse", "ssse", "movbe", "popcnt", "abm", "adx", "gfni", "vaes")
_INSTRUCTIONS_ARM = ("asimd", "sve", "bf16", "i8mm", "fphp", "dotprod")

ENGINES = ("fused", "inductor")
_NO_PAIR = ("fused", "cuda")

INT8 = 2  # FBGEMM's SparseType
DEVICE, HOST = 0, 3  # FBGEMM's EmbeddingLocation
SCALE_BIAS_BYTES = 4  # FP16 scale and FP16 bias before a row's bytes


@dataclass(frozen=True)
class Deviation:
    """How far compiled scores lie from the artifact's, in float64 where its operations are all known, over rows that
    both have scored. compile/gate.py says what is measured."""

    rows: int  # usual ones, and those of a file
    max_abs: float
    mean_abs: float
    rank_correlation: float  # Spearman's
    labelled_rows: int = 0
    auc: float | None = None  # of the artifact, on the labelled rows
    auc_change: float | None = None  # compiled less artifact
    # The following were not told by earlier versions.
    log_odds: float | None = None  # largest deviation of probabilities' log-odds; None of other scores
    bias: float | None = None  # mean of the compiled by mean of the artifact's, less 1; of probabilities
    extreme_rows: int = 0  # long bags, repeated ids, large values
    extreme_max_abs: float = 0.0
    extreme_mean_abs: float = 0.0
    left_out: int = 0  # rows that the artifact itself scores as no number
    own_max_abs: float | None = None  # of the artifact's own scores from those in float64
    own_log_odds: float | None = None
    own_extreme: float | None = None  # on average

    @property
    def is_sound(self) -> bool:
        """Whether these are numbers that a comparison gives: a manifest may say anything."""
        counts = (self.rows, self.labelled_rows, self.extreme_rows, self.left_out)
        reals = (self.max_abs, self.mean_abs, self.rank_correlation)
        auc = (self.auc, self.auc_change)
        any_size = (self.extreme_max_abs, self.extreme_mean_abs)
        optional = (self.log_odds, self.bias, self.own_max_abs, self.own_log_odds, self.own_extreme)
        return (
            all(type(count) is int and count >= 0 for count in counts)
            and all(map(_is_share, reals))
            and (auc == (None, None) or all(map(_is_share, auc)))
            and all(_is_finite(value) for value in (*any_size, *(one for one in optional if one is not None)))
        )


@dataclass(frozen=True)
class CompiledInfo:
    """What the code in a folder was compiled from and for."""

    engine: str  # one of ENGINES
    device: str  # cpu or cuda
    precision: str
    machine: str  # as platform.machine() gives it
    instructions: tuple[str, ...]  # flags of the processor that it was compiled for
    torch: str  # what compiled it; code of the inductor engine runs with this version alone
    key: str  # digest of everything that the compiled files follow from
    dense_dim: int  # D
    tables: int  # T
    dim: int
    offsets: tuple[int, ...]  # (T,) bytes into tables.bin
    row_alignment: int
    pooling: str
    limit: float  # of Deviation.max_abs
    note: str  # for people: how the layers' precisions were chosen
    dense_layers: int  # of layers; the others are the over arch's
    layers: tuple[LayerShape, ...]  # of the fused engine, in the order in which they run; else empty
    deviation: Deviation | None = None  # the largest
    deviations: Mapping[str, Deviation] = field(default_factory=dict)  # of each task, where there are several
    plan: Plan | None = None  # of the fused engine, where the model is no DLRM: then no table and no layer stands above
    whole: Whole | None = None  # of the inductor engine, likewise

    @property
    def row_bytes(self) -> int:
        """Bytes from one table row to the next."""
        return -(-(self.dim + SCALE_BIAS_BYTES) // self.row_alignment) * self.row_alignment

    @property
    def signature(self) -> str:
        """What model.pt2 itself repeats of this, so that a foreign one is told by it."""
        if self.whole is not None:
            told = json.dumps(self.whole.to_dict(), sort_keys=True).encode()
            return f"program {self.precision} {self.key} {hashlib.sha256(told).hexdigest()}"
        return f"dlrm {self.precision} dense={self.dense_dim} tables={self.tables} dim={self.dim}"

    def passed(self, found: Mapping[str, Deviation], limit: float) -> CompiledInfo:
        """The same, judged by each task's deviation."""
        worst = max(found.values(), key=lambda deviation: deviation.max_abs)
        return replace(self, deviation=worst, deviations=dict(found) if len(found) > 1 else {}, limit=limit)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in manifest.json."""
        data = asdict(replace(self, plan=None, whole=None))
        if self.whole is not None:
            return {**data, "whole": self.whole.to_dict()}
        return data if self.plan is None else {**data, "plan": self.plan.to_dict()}

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], schema: ModelSchema, tables_bytes: int) -> CompiledInfo:
        """The manifest's "compiled". Raises ArtifactError on anything missing, of a wrong type, or that would let an
        id that the schema allows read outside of the ``tables_bytes`` bytes of tables.bin."""
        data = manifest.get("compiled")
        try:
            if not isinstance(data, Mapping):
                raise TypeError("it is missing")
            deviation = None if data["deviation"] is None else Deviation(**data["deviation"])
            lists = {key: tuple(data[key]) for key in ("instructions", "offsets")}
            layers = tuple(LayerShape(**layer) for layer in data["layers"])
            plan = None if data.get("plan") is None else Plan.from_dict(data["plan"])
            whole = None if data.get("whole") is None else Whole.from_dict(data["whole"])
            each = {str(task): Deviation(**told) for task, told in data.get("deviations", {}).items()}
            made = {"layers": layers, "deviation": deviation, "deviations": each, "plan": plan, "whole": whole}
            info = cls(**{**data, **lists, **made})
        except (TypeError, KeyError, AttributeError) as error:
            raise ArtifactError(
                f"the manifest's compiled section is damaged ({error}); compile the model again"
            ) from None
        info._check(schema, tables_bytes)
        return info

    def _check(self, schema: ModelSchema, tables_bytes: int) -> None:
        numbers = (self.dense_dim, self.tables, self.dim, self.row_alignment, self.dense_layers, *self.offsets)
        texts = (self.precision, self.machine, self.torch, self.key, self.pooling, self.note, *self.instructions)
        if not all(type(number) is int for number in numbers) or not all(isinstance(text, str) for text in texts):
            raise ArtifactError("the manifest's compiled section has values of wrong types; compile the model again")
        told = [*self.deviations.values(), *([self.deviation] if self.deviation else [])]
        if not _is_share(self.limit) or self.limit < 0 or not all(deviation.is_sound for deviation in told):
            raise ArtifactError("the manifest's limit or deviation is no such number; compile the model again")
        if self.engine not in ENGINES or self.device not in ("cpu", "cuda") or (self.engine, self.device) == _NO_PAIR:
            raise ArtifactError(
                f"the manifest names the engine {str(self.engine)[:64]!r} on {str(self.device)[:64]!r}, which this "
                "Narsil does not know; compile the model again"
            )
        if self.plan is not None:
            self._check_plan(self.plan, schema, tables_bytes)
            return
        if self.whole is not None:
            if self.engine != "inductor" or self.device != "cpu" or self.layers or self.offsets:
                raise ArtifactError("the manifest has lookups beside a DLRM's; compile the model again")
            self.whole.check(schema, tables_bytes)
            return
        if not 1 <= self.row_alignment <= 1 << 24 or self.dim < 1:
            raise ArtifactError("the manifest's compiled section has impossible sizes; compile the model again")
        dims = {feature.dim for feature in schema.features} | {self.dim}
        poolings = {feature.pooling for feature in schema.features}
        mixed = len(poolings) > 1 and self.pooling == "mixed" and self.engine == "fused"
        counts = {schema.num_features, self.tables, len(self.offsets)}
        if (
            len(dims) != 1
            or not (mixed or poolings == {self.pooling})
            or len(counts) != 1
            or self.dense_dim != schema.dense_dim
            or schema.widths != (1,)
        ):
            raise ArtifactError("the manifest's schema and compiled section differ; compile the model again")
        if self.engine == "fused":
            self._check_layers()
        for feature, start in zip(schema.features, self.offsets, strict=True):
            if feature.least:
                raise ArtifactError(
                    f"ids of {feature.name} begin below 0, and would be read out of bounds; compile the model again"
                )
            if start < 0 or start + feature.rows * self.row_bytes > tables_bytes:
                raise ArtifactError(
                    f"the table of {feature.name} would end beyond tables.bin ({tables_bytes} bytes): ids would be "
                    "read out of bounds; compile the model again"
                )

    def _check_plan(self, plan: Plan, schema: ModelSchema, tables_bytes: int) -> None:
        if self.engine != "fused" or self.layers or self.offsets or self.whole is not None:
            raise ArtifactError("the manifest has a plan beside a DLRM's layers; compile the model again")
        plan.check(schema.num_features, schema.dense_dim, list(schema.widths), tables_bytes)

    def _check_layers(self) -> None:
        """Raises ArtifactError unless each layer takes what comes before it: the code trusts their sizes."""
        for layer in self.layers:
            layer.check()
        dense, over = self.layers[: self.dense_layers], self.layers[self.dense_layers :]
        if self.dense_layers < 1 or len(over) < 2:
            raise ArtifactError("the manifest's layers are no DLRM's; compile the model again")
        joined = self.dim + self.tables * (self.tables + 1) // 2
        for layers, first, last in ((dense, self.dense_dim, self.dim), (over, joined, 1)):
            widths = [first, *(layer.outputs for layer in layers)]
            if widths[:-1] != [layer.inputs for layer in layers] or widths[-1] != last:
                raise ArtifactError("the manifest's layers do not chain; compile the model again")
        if over[-1].kind != "fp32":
            raise ArtifactError("the manifest's last layer is not in fp32; compile the model again")


def _is_share(value: object) -> bool:
    """Whether it is a number from -1 to 1 or a rounding beyond: no NaN, no integer that is too large for a float."""
    return type(value) in (int, float) and -1.001 <= value <= 1.001  # type: ignore[operator]


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def processor_flags() -> tuple[str, ...]:
    """The instruction sets of this machine's processor, as Linux names them; empty where it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    known = _INSTRUCTIONS if platform.machine() in ("x86_64", "AMD64") else _INSTRUCTIONS_ARM
    for line in text.splitlines():
        label, _, value = line.partition(":")
        if label.strip().lower() in ("flags", "features"):
            return tuple(sorted(flag for flag in value.split() if flag.startswith(known)))
    return ()


def machine_problem(info: CompiledInfo, gpu: tuple[str, ...] = ()) -> str | None:
    """Why this machine's processor cannot run what was compiled, with what to do; None where it can.

    ``gpu``: the flags of its GPU. Whether the libraries that the code needs are there, only loading it tells.
    """
    again = "compile the model again here with `narsil compile`"
    if info.machine != platform.machine():
        return f"it was compiled for {info.machine} and this machine is {platform.machine()}; {again}"
    lacking = sorted(set(info.instructions) - set(processor_flags()) - set(gpu))
    if lacking:
        return f"it was compiled for a processor with {', '.join(lacking[:6])}, which this one lacks; {again}"
    return None
