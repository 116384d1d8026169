"""What a compile is asked for, and what of it this machine can do.

Imports torch only where the inductor engine is asked for, so that `narsil compile --help` needs none.
"""

from __future__ import annotations

from dataclasses import dataclass

from narsil.artifacts.compiled_info import processor_flags
from narsil.artifacts.packed import kinds_here
from narsil.compile.toolchain import require_compiler
from narsil.errors import ConfigError, DeviceUnavailable

__all__ = ["ENGINE_CHOICES", "PRECISIONS", "CompileOptions", "resolved"]

PRECISIONS = ("auto", "fp32", "bf16", "int8")
ENGINE_CHOICES = ("auto", "fused", "inductor")


@dataclass(frozen=True)
class CompileOptions:
    """Options that this machine can fulfil."""

    precision: str  # as it was asked for
    engine: str  # fused or inductor
    device: str  # cpu or cuda
    limit: float | None  # of the largest deviation of a score; None: each precision's own, see gate.limits_for
    precisions: tuple[str, ...]  # to try in turn; of the fused engine, auto is the planner's to choose
    may_fall_back: bool = False  # from the fused engine to the inductor engine, where it has not every step


def resolved(precision: str, engine: str, device: str, limit: float | None) -> CompileOptions:
    """What to compile for: the fused engine wherever it runs, where ``engine`` is auto.

    Raises ConfigError on what does not exist, or where this processor, torch or the C++ compiler lacks what is asked
    for, and DeviceUnavailable where the device is missing.
    """
    _check_asked(precision, limit)
    _check_device(device)
    asked, engine = engine, _engine(engine, device)
    require_compiler()
    return CompileOptions(
        precision, engine, device, limit, _precisions(precision, engine, device), asked == "auto" and engine == "fused"
    )


def _check_asked(precision: str, limit: float | None) -> None:
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if limit is not None and not 0 <= limit <= 1:
        raise ConfigError(f"the largest deviation of a score must lie between 0 and 1, not {limit}")


def _check_device(device: str) -> None:
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device must be cpu or cuda, not {device!r}")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise DeviceUnavailable(
                "compiling for cuda needs a GPU and a torch that is built for it, and there is none on this machine; "
                "use --device cpu, or compile where the model will be served"
            )


def _engine(engine: str, device: str) -> str:
    if engine not in ENGINE_CHOICES:
        raise ConfigError(f"engine must be one of {', '.join(ENGINE_CHOICES)}, not {engine!r}")
    if engine == "fused" and device != "cpu":
        raise ConfigError(f"the fused engine runs on the cpu, not on {device}; use --engine inductor")
    possible = device == "cpu" and bool(kinds_here(processor_flags()))
    if engine == "fused" and not possible:
        raise ConfigError("the fused engine runs on x86 processors with AVX-512; use --engine inductor")
    return ("fused" if possible else "inductor") if engine == "auto" else engine


def _precisions(precision: str, engine: str, device: str) -> tuple[str, ...]:
    instead = "; use another precision, or auto for what pays here"
    if engine == "fused":
        if precision not in ("auto", *kinds_here(processor_flags())):
            raise ConfigError(f"this processor has no vector instructions for {precision}" + instead)
        return (precision,)
    if precision == "int8":
        raise ConfigError("int8 needs the fused engine, and with it an x86 processor with AVX-512 and VNNI" + instead)
    import torch

    has_bf16 = torch.cuda.is_bf16_supported() if device == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if precision == "auto":
        return ("bf16", "fp32") if has_bf16 else ("fp32",)
    if precision == "bf16" and not has_bf16:
        raise ConfigError("this device has no vector instructions for bf16" + instead)
    return (precision,)
