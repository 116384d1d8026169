"""Build the C++ baseline against a Python environment's torch and print the binary's path.

    python benchmarks/baselines/torchrec_cpp/build.py [--python PY] --build-dir DIR

The path is the only line on stdout; the compiler's output goes to stderr. When a tool, a system library or a
Python package is missing, one line on stderr names what to install and the exit status is 3, so that a caller
can leave the baseline out. A build that is up to date takes well under a second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BINARY = "torchrec_cpp_server"
MISSING = 3

# What the build calls or links, and the Debian package that brings it.
TOOLS = {
    "g++": "g++",
    "cmake": "cmake",
    "ninja": "ninja-build",
    "pkg-config": "pkg-config",
    "protoc": "protobuf-compiler",
    "grpc_cpp_plugin": "protobuf-compiler-grpc",
}
LIBRARIES = {"grpc++": "libgrpc++-dev", "protobuf": "libprotobuf-dev"}

# The packages' folders, found without importing them: torch alone takes seconds to import.
FIND_PACKAGES = """
import importlib.util, json
names = ("torch", "fbgemm_gpu")
specs = {name: importlib.util.find_spec(name) for name in names}
print(json.dumps({n: s.submodule_search_locations[0] for n, s in specs.items() if s is not None}))
"""


class MissingError(Exception):
    """Something the build needs is not installed; the message says what."""


def require_system_packages() -> None:
    """Raise `MissingError` naming every Debian package that the build lacks."""
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if "pkg-config" not in missing:
        missing += [
            package
            for library, package in LIBRARIES.items()
            if subprocess.run(["pkg-config", "--exists", library], check=False).returncode != 0
        ]
    if missing:
        raise MissingError(f"the C++ baseline needs: apt-get install {' '.join(missing)}")


def find_packages(python: str) -> dict[str, str]:
    """Return the folders of `torch` and `fbgemm_gpu` as the given interpreter would import them."""
    try:
        found = subprocess.run([python, "-c", FIND_PACKAGES], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MissingError(f"the C++ baseline needs a working Python: {python} failed ({error})") from None
    packages: dict[str, str] = json.loads(found.stdout)
    missing = [name for name in ("torch", "fbgemm_gpu") if name not in packages]
    if missing:
        raise MissingError(f"the C++ baseline needs {' and '.join(missing)} in {python}'s environment")
    return packages


def build(python: str, build_dir: Path) -> Path:
    """Configure and build in `build_dir`; return the binary's path.

    Raises `MissingError` for what is not installed and `CalledProcessError` when the build itself fails.
    """
    require_system_packages()
    packages = find_packages(python)
    configure = [
        *("cmake", "-S", str(HERE), "-B", str(build_dir), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        f"-DTORCH_DIR={packages['torch']}",
        f"-DFBGEMM_DIR={packages['fbgemm_gpu']}",
    ]
    compile_ = ["cmake", "--build", str(build_dir), "-j2"]
    for command in (configure, compile_):
        subprocess.run(command, check=True, stdout=sys.stderr)
    return build_dir / BINARY


def main() -> int:
    """Parse the command line, build, print the path."""
    parser = argparse.ArgumentParser(description="Build the C++ baseline and print the binary's path.")
    parser.add_argument("--python", default=sys.executable, help="whose torch and fbgemm_gpu to link")
    parser.add_argument("--build-dir", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        binary = build(arguments.python, arguments.build_dir.resolve())
    except MissingError as error:
        print(error, file=sys.stderr)
        return MISSING
    except subprocess.CalledProcessError as error:
        print(f"the C++ baseline does not build: {error}", file=sys.stderr)
        return 1
    print(binary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
