"""Values of options that cannot be meant are refused before any work, with the option's name."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from narsil.cli import cli

NUMBERS = ["nan", "inf", "-1"]


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("predict --seed", "-1"),
        ("bench --seed", "-1"),
        ("package dlrm --out x --seed", "-1"),
        *(("predict --timeout", value) for value in NUMBERS),
        *(("bench --timeout", value) for value in NUMBERS),
        *(("bench --rate", value) for value in NUMBERS),
        *(("verify --model x --timeout", value) for value in NUMBERS),
        *(("verify --model x --max-deviation", value) for value in NUMBERS),
        *(("compile x --out y --max-deviation", value) for value in NUMBERS),
        ("predict --target", ""),
        ("bench --target", " "),
        ("package dlrm --out", ""),
        ("compile x --out", ""),
        ("verify --model", ""),
        ("bench --json", ""),
        ("serve --model", ""),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(line, value):
    *given, option = line.split()
    result = CliRunner().invoke(cli, [*given, option, value])
    assert result.exit_code == 2, result.output
    assert f"Invalid value for '{option}'" in result.output
