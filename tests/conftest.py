"""Fixtures and options that every suite shares."""

from hypothesis import settings

pytest_plugins = ["tests.fixtures_models", "tests.fixtures_compiled", "tests.strictness", "pytester"]

# How long an example takes says something of the machine, and nothing of the code.
settings.register_profile("narsil", deadline=None)
settings.load_profile("narsil")
