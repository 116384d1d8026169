"""Generates the protobuf modules when the package is built; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PROTOS = ("predictor", "narsil")


class BuildWithProtos(build_py):
    """build_py, preceded by protoc: proto/NAME.proto becomes narsil/protos/NAME_pb2.py."""

    def run(self) -> None:
        from grpc_tools import protoc

        out = ROOT / "src" / "narsil" / "protos"
        arguments = ["protoc", f"-I{ROOT / 'proto'}", f"--python_out={out}"]
        if protoc.main(arguments + [str(ROOT / "proto" / f"{name}.proto") for name in PROTOS]):
            raise SystemExit("protoc failed; see its message above")
        super().run()


setup(cmdclass={"build_py": BuildWithProtos})
