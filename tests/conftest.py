"""Fixtures and options that every suite shares."""

import signal

from hypothesis import settings

pytest_plugins = ["tests.fixtures_models", "tests.fixtures_compiled", "tests.strictness", "pytester"]

# A runner in the background has some signals ignored (nohup, a shell's &), and what it starts inherits that. Tests
# hold what Narsil does where nobody has asked for it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# How long an example takes says something of the machine, and nothing of the code.
settings.register_profile("narsil", deadline=None)
settings.load_profile("narsil")
