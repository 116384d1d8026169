"""What the project promises is said alike wherever it is said."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LEAST = PROJECT["project"]["requires-python"].removeprefix(">=")


def test_the_tests_run_on_the_oldest_python_that_the_tools_are_told_of():
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{LEAST.replace('.', '')}"
    assert PROJECT["tool"]["mypy"]["python_version"] == LEAST


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("README.md", r"Python (3\.\d+) or newer"),
        ("Makefile", r"Python (3\.\d+) or newer"),
        ("Makefile", r"sys\.version_info < \((3, \d+)\)"),
    ],
)
def test_every_mention_of_the_least_python_is_the_one_that_is_required(file, pattern):
    found = re.findall(pattern, (ROOT / file).read_text(encoding="utf-8"))
    assert {mention.replace(", ", ".") for mention in found} == {LEAST}


def test_the_pinned_versions_make_no_exceptions_for_older_pythons():
    assert "python_version" not in (ROOT / "constraints.txt").read_text(encoding="utf-8")
