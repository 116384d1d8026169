"""What figures depend on, for a report's machine section: the processor named in full, what of it may be used, what was
run on it, and from which sources.

Reads /proc, the usable cores, the installed versions and the git checkout that this package lies in, if it lies in one.
"""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from narsil.artifacts.compiled_info import processor_flags
from narsil.bench.peak import matrix_product_peaks
from narsil.cgroups import memory_limit, usable_cores

__all__ = ["Processor", "Sources", "folder_of", "in_words", "machine", "read_processor", "read_sources"]

PACKAGES = ("narsil", "torch", "fbgemm-gpu-cpu", "fbgemm-gpu", "onnxruntime", "grpcio", "numpy")
NO_NUMBER = re.compile(r"[^a-z0-9]+")

# Vendor, family -> (first model, last model, microarchitecture), as the Linux kernel tells them apart: AMD's in
# arch/x86/kernel/cpu/amd.c, Intel's in arch/x86/include/asm/intel-family.h.
MICROARCHITECTURES: Mapping[tuple[str, int], Sequence[tuple[int, int, str]]] = {
    ("AuthenticAMD", 23): (
        (0x00, 0x2F, "Zen"),
        (0x30, 0x4F, "Zen 2"),
        (0x50, 0x5F, "Zen"),
        (0x60, 0x7F, "Zen 2"),
        (0x90, 0x91, "Zen 2"),
        (0xA0, 0xAF, "Zen 2"),
    ),
    ("AuthenticAMD", 25): (
        (0x00, 0x0F, "Zen 3"),
        (0x10, 0x1F, "Zen 4"),
        (0x20, 0x5F, "Zen 3"),
        (0x60, 0xAF, "Zen 4"),
    ),
    ("AuthenticAMD", 26): (
        (0x00, 0x2F, "Zen 5"),
        (0x40, 0x4F, "Zen 5"),
        (0x60, 0x7F, "Zen 5"),
    ),
    ("GenuineIntel", 6): (
        (0x3F, 0x3F, "Haswell"),
        (0x4E, 0x4E, "Skylake"),
        (0x4F, 0x4F, "Broadwell"),
        (0x55, 0x55, "Skylake"),  # its later steppings are below
        (0x56, 0x56, "Broadwell"),
        (0x5E, 0x5E, "Skylake"),
        (0x6A, 0x6A, "Ice Lake"),
        (0x6C, 0x6C, "Ice Lake"),
        (0x7D, 0x7E, "Ice Lake"),
        (0x8C, 0x8D, "Tiger Lake"),
        (0x8F, 0x8F, "Sapphire Rapids"),
        (0x97, 0x97, "Alder Lake"),
        (0x9A, 0x9A, "Alder Lake"),
        (0xAA, 0xAA, "Meteor Lake"),
        (0xAC, 0xAC, "Meteor Lake"),
        (0xAD, 0xAE, "Granite Rapids"),
        (0xAF, 0xAF, "Sierra Forest"),
        (0xB7, 0xB7, "Raptor Lake"),
        (0xBA, 0xBA, "Raptor Lake"),
        (0xBF, 0xBF, "Raptor Lake"),
        (0xCF, 0xCF, "Emerald Rapids"),
    ),
}
# One model number for three generations: the first stepping of each later one.
STEPPINGS = {("GenuineIntel", 6, 0x55): ((10, "Cooper Lake"), (5, "Cascade Lake"))}
# The names that AMD's servers are sold by the numbers of, where the kernel has but the microarchitecture.
CODE_NAMES = {
    ("AuthenticAMD", 23, 0x01): "Naples",
    ("AuthenticAMD", 23, 0x31): "Rome",
    ("AuthenticAMD", 25, 0x01): "Milan",
    ("AuthenticAMD", 25, 0x11): "Genoa",
    ("AuthenticAMD", 25, 0xA0): "Bergamo",
    ("AuthenticAMD", 26, 0x02): "Turin",
    ("AuthenticAMD", 26, 0x11): "Turin Dense",
}
# Of the instruction sets, those that decide how fast layers are multiplied.
DECISIVE = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "sve",
    "bf16",
    "i8mm",
)

# What figures follow from; results and what is rendered from them change with every measurement.
SOURCES = ("src", "csrc", "proto", "benchmarks", "setup.py", "pyproject.toml", "constraints.txt")
NO_SOURCES = ("benchmarks/results", "benchmarks/texts")


@dataclass(frozen=True)
class Processor:
    """A processor as it names itself, and what it is known as."""

    name: str
    vendor: str  # AuthenticAMD, GenuineIntel; on Arm the implementer's number
    family: int | None
    model: int | None  # on Arm the part's number
    stepping: int | None
    virtual: bool  # seen through a hypervisor, which may hide or share parts of it

    @property
    def microarchitecture(self) -> str:
        """Its generation, Zen 4 say; empty where the table does not have it."""
        if self.family is None or self.model is None:
            return ""
        for first, name in STEPPINGS.get((self.vendor, self.family, self.model), ()):
            if self.stepping is not None and self.stepping >= first:
                return name
        for low, high, name in MICROARCHITECTURES.get((self.vendor, self.family), ()):
            if low <= self.model <= high:
                return name
        return ""

    @property
    def code_name(self) -> str:
        """The product's name while it was made, Genoa say; empty where the table does not have it."""
        if self.family is None or self.model is None:
            return ""
        return CODE_NAMES.get((self.vendor, self.family, self.model), "")


@dataclass(frozen=True)
class Sources:
    """The state of the checkout that this code runs from."""

    commit: str | None  # None: it runs from no checkout
    uncommitted: tuple[str, ...] = ()  # files that the figures may follow from and no commit has


def read_processor(cpuinfo: str) -> Processor:
    """The first processor of /proc/cpuinfo's text; what it does not say is empty or None."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        label, colon, value = line.partition(":")
        if colon:
            fields.setdefault(label.strip().lower(), value.strip())
    return Processor(
        name=fields.get("model name", ""),
        vendor=fields.get("vendor_id", fields.get("cpu implementer", "")),
        family=_number(fields.get("cpu family", fields.get("cpu architecture"))),
        model=_number(fields.get("model", fields.get("cpu part"))),
        stepping=_number(fields.get("stepping", fields.get("cpu revision"))),
        virtual="hypervisor" in fields.get("flags", "").split(),
    )


def machine(*, peak: bool = False) -> dict[str, Any]:
    """This machine and what runs on it, as plain values. ``peak`` measures it too, for some seconds: nothing else that
    belongs to the measurement should run meanwhile."""
    info = Path("/proc/cpuinfo")
    processor = read_processor(info.read_text(errors="replace") if info.exists() else "")
    sources = read_sources()
    return {
        "cpu": processor.name or platform.processor(),
        "vendor": processor.vendor,
        "family": processor.family,
        "model": processor.model,
        "stepping": processor.stepping,
        "microarchitecture": processor.microarchitecture,
        "code_name": processor.code_name,
        "virtual": processor.virtual,
        "instructions": list(processor_flags()),
        "cores": usable_cores(),
        "memory_gib": round((memory_limit() or 0) / 2**30, 1),
        "peak_gflop_per_s": matrix_product_peaks() if peak else {},
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": sources.commit,
        "uncommitted": list(sources.uncommitted),
    }


def in_words(about: Mapping[str, Any]) -> str:
    """A report's machine section as text, without its sources. Older sections say less."""
    cores = f"{about['cores']} core{'' if about['cores'] == 1 else 's'} of {about['cpu'] or 'an unnamed processor'}"
    peaks = peaks_in_words(about.get("peak_gflop_per_s") or {})
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts = [
        f"{cores} ({_numbers(about)})" if _numbers(about) else cores,
        f"{about['memory_gib']} GiB",
        about["system"],
        f"Python {about['python']}",
    ]
    return f"{', '.join(parts)}; {versions}" + (f". {peaks}" if peaks else "")


def peaks_in_words(peaks: Mapping[str, float]) -> str:
    """The matrix products' speeds in one sentence without its full stop; empty where none was measured."""
    if not peaks:
        return ""
    return "One core multiplies large matrices at " + ", ".join(
        f"{speed:,.0f} GFLOP/s in {kind}" for kind, speed in peaks.items()
    )


def folder_of(about: Mapping[str, Any]) -> str:
    """The name of the folder that this machine's results lie in: zen4, say, or genuineintel-6-207."""
    numbers = (about.get("vendor"), about.get("family"), about.get("model"))
    name = about.get("microarchitecture") or "-".join(str(number) for number in numbers if number not in (None, ""))
    return NO_NUMBER.sub("" if about.get("microarchitecture") else "-", name.lower()) or "unknown"


def read_sources(here: Path = Path(__file__)) -> Sources:
    """The commit of the checkout that ``here`` belongs to, and what differs from it. A package that merely lies inside
    of somebody else's checkout, an environment's say, belongs to none."""
    if _git(here.parent, "ls-files", "--error-unmatch", "--", here.name) is None:
        return Sources(None)
    commit = _git(here.parent, "rev-parse", "--short", "HEAD")
    paths = [f":(top){path}" for path in SOURCES] + [f":(top,exclude){path}" for path in NO_SOURCES]
    changed = _git(here.parent, "status", "--porcelain", "--", *paths)
    return Sources((commit or "").strip() or None, tuple(line[3:] for line in (changed or "").splitlines()))


def _numbers(about: Mapping[str, Any]) -> str:
    """What a processor is by its numbers, in words; empty where a report does not have them."""
    code, known = about.get("code_name"), about.get("microarchitecture")
    family = f"{about.get('vendor')} family {about.get('family')} model {about.get('model')}"
    parts = [
        f"{known} {code}" if known and code else known,
        family if about.get("family") is not None else "",
        " ".join(flag for flag in DECISIVE if flag in about.get("instructions", ())),
        "virtual" if about.get("virtual") else "",
    ]
    return "; ".join(part for part in parts if part)


def _number(text: str | None) -> int | None:
    try:
        return int(text or "", 0)
    except ValueError:
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
