"""A report's machine section: the processor by its numbers, the sources by their checkout, the peak by measurement."""

from __future__ import annotations

import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from narsil.bench.machine import (
    MICROARCHITECTURES,
    Sources,
    folder_of,
    in_words,
    machine,
    read_processor,
    read_sources,
)
from narsil.bench.peak import SIZE, MatrixProducts, matrix_product_peaks


def cpuinfo(vendor: str, family: int, model: int, stepping: int = 0, flags: str = "fpu avx2") -> str:
    one = (
        f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\n"
        f"model name\t: Some Processor\nstepping\t: {stepping}\nflags\t\t: {flags}\nbugs\t\t: none\n\n"
    )
    return one + one.replace("processor\t: 0", "processor\t: 1")


@pytest.mark.parametrize(
    ("vendor", "family", "model", "stepping", "microarchitecture", "code_name"),
    [
        ("AuthenticAMD", 23, 1, 2, "Zen", "Naples"),
        ("AuthenticAMD", 23, 49, 0, "Zen 2", "Rome"),
        ("AuthenticAMD", 25, 1, 1, "Zen 3", "Milan"),
        ("AuthenticAMD", 25, 17, 1, "Zen 4", "Genoa"),
        ("AuthenticAMD", 25, 160, 2, "Zen 4", "Bergamo"),
        ("AuthenticAMD", 25, 33, 0, "Zen 3", ""),
        ("AuthenticAMD", 26, 2, 1, "Zen 5", "Turin"),
        ("AuthenticAMD", 26, 255, 0, "", ""),
        ("GenuineIntel", 6, 85, 4, "Skylake", ""),
        ("GenuineIntel", 6, 85, 7, "Cascade Lake", ""),
        ("GenuineIntel", 6, 85, 11, "Cooper Lake", ""),
        ("GenuineIntel", 6, 106, 6, "Ice Lake", ""),
        ("GenuineIntel", 6, 143, 8, "Sapphire Rapids", ""),
        ("GenuineIntel", 6, 207, 2, "Emerald Rapids", ""),
        ("GenuineIntel", 25, 17, 1, "", ""),  # numbers are a vendor's own
    ],
)
def test_a_processor_is_known_by_its_vendor_s_numbers(vendor, family, model, stepping, microarchitecture, code_name):
    found = read_processor(cpuinfo(vendor, family, model, stepping))
    assert (found.vendor, found.family, found.model, found.stepping) == (vendor, family, model, stepping)
    assert (found.name, found.microarchitecture, found.code_name) == ("Some Processor", microarchitecture, code_name)
    assert not found.virtual


def test_a_hypervisor_is_seen():
    assert read_processor(cpuinfo("AuthenticAMD", 25, 17, flags="avx2 hypervisor lahf_lm")).virtual


def test_an_arm_processor_is_named_by_its_numbers():
    text = "Features: asimd sve\nCPU implementer: 0x41\nCPU architecture: 8\nCPU part: 0xd40\nCPU revision: 1"
    found = read_processor(text)
    assert (found.vendor, found.family, found.model, found.stepping) == ("0x41", 8, 0xD40, 1)
    assert found.microarchitecture == ""


@pytest.mark.parametrize("text", ["", "model\t: lots\n", "no colon at all"])
def test_what_is_not_said_is_not_invented(text):
    found = read_processor(text)
    assert (found.family, found.model, found.microarchitecture, found.code_name) == (None, None, "", "")


def test_no_model_number_belongs_to_two_generations():
    for ranges in MICROARCHITECTURES.values():
        assert all(first <= last for first, last, _ in ranges)
        assert all(earlier[1] < later[0] for earlier, later in pairwise(ranges))


def test_results_lie_in_a_folder_that_says_which_processor_it_was():
    assert folder_of({"microarchitecture": "Zen 4", "vendor": "AuthenticAMD", "family": 25, "model": 17}) == "zen4"
    assert folder_of({"microarchitecture": "Sapphire Rapids"}) == "sapphirerapids"
    assert folder_of({"microarchitecture": "", "vendor": "GenuineIntel", "family": 6, "model": 0}) == "genuineintel-6-0"
    assert folder_of({"cpu": "what an older report says"}) == "unknown"


def test_the_machine_is_told_in_full():
    about = {
        **machine(), "cpu": "AMD EPYC", "vendor": "AuthenticAMD", "family": 25, "model": 17,
        "microarchitecture": "Zen 4", "code_name": "Genoa", "virtual": True, "cores": 2, "memory_gib": 23.5,
        "instructions": ["abm", "avx2", "avx512_vnni", "avx512f"],
        "peak_gflop_per_s": {"fp32": 108.4, "int8": 1432.0},
    }  # fmt: skip
    told = in_words(about)
    assert told.startswith(
        "2 cores of AMD EPYC (Zen 4 Genoa; AuthenticAMD family 25 model 17; avx2 avx512f avx512_vnni; virtual), 23.5"
    )
    assert told.endswith("One core multiplies large matrices at 108 GFLOP/s in fp32, 1,432 GFLOP/s in int8")
    older = {key: about[key] for key in ("cpu", "memory_gib", "system", "python", "versions")} | {"cores": 1}
    assert in_words(older).startswith("1 core of AMD EPYC, 23.5 GiB, Linux")
    assert "GFLOP" not in in_words(older)


def test_this_machine_has_all_of_it():
    about = machine()
    assert {"cpu", "vendor", "family", "model", "stepping", "microarchitecture", "instructions"} <= about.keys()
    assert about["cores"] >= 1
    assert about["peak_gflop_per_s"] == {}  # not asked for


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch) -> Path:
    """A repository of this one's shape with one commit."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    for path in ("src/narsil/bench/machine.py", "benchmarks/results/zen4/demo.json", "README.md", ".gitignore"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("*.so\n" if path == ".gitignore" else "first\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "first")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_sources_are_those_of_the_checkout_and_results_are_none(checkout):
    here = checkout / "src/narsil/bench/machine.py"
    commit = git(checkout, "rev-parse", "--short", "HEAD")
    (checkout / "benchmarks/results/zen4/demo.json").write_text("measured anew\n")
    (checkout / "README.md").write_text("rendered anew\n")
    (checkout / "src/narsil/_native.so").write_text("built\n")
    assert read_sources(here) == Sources(commit)


@pytest.mark.parametrize("path", ["src/narsil/bench/machine.py", "src/narsil/new.py", "csrc/new.cpp"])
def test_what_no_commit_has_is_named(checkout, path):
    (checkout / path).parent.mkdir(parents=True, exist_ok=True)
    (checkout / path).write_text("not committed\n")
    found = read_sources(checkout / "src/narsil/bench/machine.py")
    assert found.commit
    assert len(found.uncommitted) == 1
    assert path.startswith(found.uncommitted[0])  # of a new folder git names the folder alone


def test_a_package_inside_of_somebody_else_s_checkout_has_no_commit(checkout):
    installed = checkout / "src/site-packages/narsil/machine.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("installed\n")
    assert read_sources(installed) == Sources(None)


def test_without_git_there_is_no_commit(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert read_sources(checkout / "src/narsil/bench/machine.py") == Sources(None)


def test_the_peak_is_measured_on_one_thread_in_each_kind_of_number():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = matrix_product_peaks(seconds=0.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert "fp32" in found
    assert all(1 < speed < 1e5 for speed in found.values())


def test_a_kind_s_speed_is_that_of_its_fastest_kernel():
    pytest.importorskip("torch")
    products = MatrixProducts()
    now = [0.0]
    took = {"slow": 4.0, "fast": 2.0, "other": 1.0}

    def kernel(name):
        def run() -> None:
            now[0] += took[name]

        return run

    products._kernels = [("fp32", kernel("fast")), ("fp32", kernel("slow")), ("int8", kernel("other"))]
    work = 2 * SIZE**3 / 1e9
    assert products.measure(lambda: now[0]) == {"fp32": work / 2, "int8": work}
