"""Which C++ compiler is taken."""

from __future__ import annotations

import shutil

import pytest

from narsil.compile.toolchain import require_compiler
from narsil.errors import ConfigError


@pytest.fixture(autouse=True)
def _programs(monkeypatch):
    """There are these and no others."""
    monkeypatch.setattr(shutil, "which", {name: f"/bin/{name}" for name in ("clang++", "mine")}.get)


@pytest.mark.parametrize(("named", "taken"), [("mine", "/bin/mine"), ("", "/bin/clang++")])
def test_the_compiler_is_the_one_that_cxx_names_or_any(monkeypatch, named, taken):
    monkeypatch.setenv("CXX", named)
    assert require_compiler() == taken


def test_a_compiler_that_cxx_names_and_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setenv("CXX", "g++-99")
    with pytest.raises(ConfigError, match=r"CXX is 'g\+\+-99', which is no program here"):
        require_compiler()
