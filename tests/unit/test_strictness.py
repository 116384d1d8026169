"""The options that let a run fail where it would pass without having tested anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from narsil.extension import AVAILABLE
from tests import strictness

SKIPS = """
import pytest

def test_that_runs():
    pass

@pytest.mark.skipif(True, reason="{reason}")
def test_that_does_not():
    pass
"""


CONFTEST = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
pytest_plugins = ["tests.strictness"]
"""


def ran(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    pytester.makeconftest(CONFTEST)
    return pytester.runpytest("-p", "no:cacheprovider", *options)


@pytest.mark.parametrize(
    ("reason", "options", "code"),
    [
        ("built without it", ["--complete"], 1),
        ("built without it", ["--complete", "--numprocesses", "1"], 1),  # `make test` has the tests run elsewhere
        ("built without it", [], 0),
        ("the fused engine needs AVX-512", ["--complete"], 0),
    ],
)
def test_a_complete_run_fails_on_a_skip_that_is_not_the_machine_s(pytester, reason, options, code):
    pytester.makepyfile(SKIPS.format(reason=reason))
    found = ran(pytester, *options)
    assert found.ret == code
    found.assert_outcomes(passed=1, skipped=1)
    assert (reason in found.stdout.str().partition("must be complete")[2]) == (code == 1)


def test_a_complete_run_fails_on_a_module_that_is_skipped_as_a_whole(pytester):
    pytester.makepyfile("import pytest\npytest.importorskip('no_such_library')")
    pytester.makepyfile(test_other="def test_that_runs(): pass")
    assert ran(pytester).ret == 0
    assert ran(pytester, "--complete").ret == 1
    assert ran(pytester, "--complete", "--numprocesses", "1").ret == 1


@pytest.mark.skipif(not AVAILABLE, reason="built without the native extension")
def test_extensions_without_sanitizers_are_refused_by_name(monkeypatch, tmp_path):
    import narsil._native

    plain, sanitized = tmp_path / "plain.so", tmp_path / "sanitized.so"
    plain.write_bytes(b"\x7fELF")
    sanitized.write_bytes(b"\x7fELF __asan_report_load4 __ubsan_handle_pointer_overflow_abort")
    monkeypatch.setattr(narsil._native, "__file__", str(sanitized))
    strictness.require_sanitized("narsil._native")
    monkeypatch.setattr(narsil._native, "__file__", str(plain))
    with pytest.raises(pytest.UsageError, match=r"plain.so calls no __asan_report_ and no __ubsan_handle_"):
        strictness.require_sanitized("narsil._native")
    with pytest.raises(pytest.UsageError, match=r"narsil\.nowhere cannot be imported"):
        strictness.require_sanitized("narsil.nowhere")
