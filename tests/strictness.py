"""Two options that let a run fail where it would pass without having tested anything.

``--complete``: a test that is skipped fails the run, unless what is missing is the machine's (see MAY_BE_MISSING).
``--sanitized``: nothing runs unless the native extensions that are imported were built with sanitizers.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

# Reasons of skips that a complete run may have: the processor, the device, and clients from other projects.
MAY_BE_MISSING = re.compile(
    r"AVX-512|VNNI|GPU|device|fused engine|bind threads|cgroups|namespaces|h2load|libgrpc\+\+-dev"
)

EXTENSIONS = ("narsil._native", "narsil._load")
SANITIZERS = (b"__asan_report_", b"__ubsan_handle_")  # what instrumented code calls


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--complete", action="store_true", help="skipped tests fail the run, unless the machine lacks it")
    parser.addoption("--sanitized", action="store_true", help="refuse native extensions built without sanitizers")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--sanitized"):
        for name in EXTENSIONS:
            require_sanitized(name)
    if config.getoption("--complete"):
        config.pluginmanager.register(Complete(), "complete")


def require_sanitized(name: str) -> None:
    """Raises UsageError unless this extension can be imported and its file calls the sanitizers."""
    try:
        file = import_module(name).__file__
    except ImportError as error:
        raise pytest.UsageError(f"--sanitized: {name} cannot be imported: {error}") from error
    code = Path(file or "").read_bytes()
    missing = [symbol.decode() for symbol in SANITIZERS if symbol not in code]
    if missing:
        raise pytest.UsageError(f"--sanitized: {file} calls no {' and no '.join(missing)}: it was built without them")


class Complete:
    """Notes every skip that is not the machine's, and fails the run at its end."""

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not MAY_BE_MISSING.search(reason):
            self.skipped.append(f"{report.nodeid}: {reason}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.skipped and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.skipped:
            terminalreporter.section("skipped in a run that must be complete")
            terminalreporter.write_line("\n".join(self.skipped))
