"""The servers that the benchmarks set side by side, the C++ baseline's build, and what the scripts' options share."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from narsil.artifacts.artifact import Artifact, open_artifact
from narsil.artifacts.compiled_info import CompiledInfo
from narsil.bench.rounds import Contender
from narsil.bench.servers import narsil_server, torchrec_cpp_server
from narsil.packaging.dlrm import DlrmConfig, random_weights
from narsil.packaging.packager import package_dlrm

HERE = Path(__file__).parent
LEFT_OUT = 3  # a script's exit status where this machine lacks what the comparison needs
BASELINE = "TorchRec-style C++ gRPC + TorchScript INT8 (baseline)"
BASELINE_BUILD = HERE.parent / "build" / "torchrec_cpp"

# Intra-op threads of the baseline, by measurement: see baselines/torchrec_cpp/README.md.
BASELINE_THREADS = json.loads((HERE / "baselines" / "torchrec_cpp" / "tuning.json").read_text())


def build_baseline(report: Callable[[str], None] = print) -> Path | None:
    """The baseline's binary, built if it has to be; None, after one line of explanation, where it cannot be."""
    done = subprocess.run(
        [sys.executable, str(HERE / "baselines" / "torchrec_cpp" / "build.py"), "--build-dir", str(BASELINE_BUILD)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return Path(done.stdout.strip().splitlines()[-1])
    reason = (done.stderr.strip() or done.stdout.strip() or "unknown reason").splitlines()[-1]
    report(f"the C++ baseline is left out: {reason}")
    return None


def baseline_threads(concurrency: int) -> int:
    """Intra-op threads that measured best for the baseline at this concurrency."""
    return int(BASELINE_THREADS["alone" if concurrency == 1 else "concurrent"])


def baseline(binary: Path, model_file: Path) -> Contender:
    """The C++ server, tuned anew for each concurrency."""
    return Contender(
        BASELINE,
        lambda concurrency: torchrec_cpp_server(binary, model_file, baseline_threads(concurrency)),
        baseline_threads,
    )


def narsil(name: str, model: Path, layers: Sequence[str] = (), **options: object) -> Contender:
    """Narsil with these settings; ``layers`` as Contender has them."""
    return Contender(name, lambda concurrency: narsil_server(model, **options), layers=tuple(layers))


def layers_of(contenders: Sequence[Contender]) -> dict[str, tuple[str, ...]]:
    """Each contender's layers by its name, for a report."""
    return {one.name: one.layers for one in contenders}


def compiled(model: Path, precisions: Sequence[str], report: Callable[[str], None] = print) -> list[Contender]:
    """Narsil on the model compiled in each of these precisions, beside it on disk. One that cannot be compiled here is
    left out, after one line of explanation. A second call finds the compiled folders."""
    contenders = []
    for precision in precisions:
        out = model.with_name(f"{model.name}-{precision}")
        done = subprocess.run(
            [sys.executable, "-m", "narsil", "compile", str(model), "--precision", precision, "--out", str(out)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            report(f"compiled {precision} is left out: {(done.stderr.strip() or 'unknown reason').splitlines()[-1]}")
            continue
        layers = [layer.kind for layer in compiled_info(open_artifact(out)).layers]
        contenders.append(narsil(f"Narsil compiled {precision}, batch mode", out, layers, backend="compiled"))
    return contenders


def compiled_info(artifact: Artifact) -> CompiledInfo:
    """What a compiled folder's manifest says of it."""
    size = artifact.tables.stat().st_size if artifact.tables else 0
    return CompiledInfo.from_manifest(artifact.manifest or {}, artifact.schema, size)


def positive(text: str) -> int:
    """An option's value that is a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def package_demo(path: Path, device: str, console: Console) -> Artifact:
    """The demo model at this path, packaged if it is missing."""
    if not (path / "manifest.json").exists():
        config = DlrmConfig()
        with console.status("packaging the demo model (about a minute)") as status:
            package_dlrm(
                config,
                random_weights(config),
                path,
                device=device,
                progress=lambda stage, done, total: status.update(f"packaging the demo model: {stage} {done}/{total}"),
            )
    artifact = open_artifact(path)
    console.print(f"model: {path} ({artifact.name}, {artifact.schema.num_features} tables)")
    return artifact
