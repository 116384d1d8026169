"""Fixtures and options that every suite shares."""

pytest_plugins = ["tests.fixtures_models", "tests.strictness", "pytester"]
