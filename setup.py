"""Describes proto/ for server reflection and builds the native extensions; everything else is in pyproject.toml."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
EXTENSIONS = ("_native", "_load")  # narsil._NAME is built from csrc/NAME/*.cpp


class BuildWithDescriptors(build_py):
    """build_py, preceded by protoc: all of proto/ becomes narsil/protos/descriptors.binpb. No code is generated."""

    def run(self) -> None:
        from grpc_tools import protoc

        sources = sorted(str(path) for path in (ROOT / "proto").rglob("*.proto"))
        out = ROOT / "src" / "narsil" / "protos" / "descriptors.binpb"
        if protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"--descriptor_set_out={out}", *sources]):
            raise SystemExit("protoc failed; see its message above")
        super().run()


class BuildNative(build_ext):
    """build_ext for the data plane and the load generator, which Narsil works without.

    BUILD_NATIVE=0 leaves them out, 1 makes a failure to build them fatal, and anything else builds them where a C++
    compiler and libnghttp2's header are.
    """

    def run(self) -> None:
        wish = os.environ.get("BUILD_NATIVE", "auto")
        missing = "BUILD_NATIVE=0 is set" if wish == "0" else self._missing()
        if missing and wish == "1":
            raise SystemExit(f"narsil: cannot build the native extensions: {missing}")
        if missing:
            print(f"narsil: built without its native data plane ({missing}); grpcio serves instead", file=sys.stderr)
            self.extensions = []
            return
        for extension in self.extensions:
            extension.optional = wish != "1"
        super().run()

    def _missing(self) -> str:
        """What a build would lack, found by compiling an empty program against the header; empty if nothing."""
        from distutils.ccompiler import new_compiler
        from distutils.errors import CompileError
        from distutils.sysconfig import customize_compiler
        from tempfile import TemporaryDirectory

        if not sys.platform.startswith("linux"):
            return "it needs Linux"
        compiler = new_compiler()
        customize_compiler(compiler)
        with TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("#include <nghttp2/nghttp2.h>\n#include <vector>\n")
            try:
                compiler.compile([str(source)], output_dir=folder)
            except (CompileError, OSError):
                return "no C++ compiler, or no libnghttp2-dev"
        return ""


def extension(name: str) -> Extension:
    """narsil.NAME from its folder of sources. BUILD_CXXFLAGS adds flags: `make sanitize` uses it.

    Warnings are errors in CI and with BUILD_NATIVE=1. What a user's newer compiler warns of stops no installation.
    Loops are aligned: most are short, and where they came to lie moved decoding by a quarter from change to change.
    """
    import pybind11

    folder = Path("csrc") / name.lstrip("_")
    flags = os.environ.get("BUILD_CXXFLAGS", "").split()
    strict = ["-Werror"] if os.environ.get("BUILD_NATIVE") == "1" or os.environ.get("CI") else []
    warnings = ["-Wall", "-Wextra", *strict]
    return Extension(
        f"narsil.{name}",
        sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob("*.cpp")),
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.hpp")),
        include_dirs=[pybind11.get_include(), "csrc"],
        libraries=["nghttp2"],
        language="c++",
        extra_compile_args=["-std=c++17", "-O3", "-falign-loops=32", "-fvisibility=hidden", *warnings, "-g0", *flags],
        extra_link_args=flags,
    )


setup(
    cmdclass={"build_py": BuildWithDescriptors, "build_ext": BuildNative},
    ext_modules=[extension(name) for name in EXTENSIONS],
)
