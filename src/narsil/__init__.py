"""Narsil: a serving engine for recommendation models."""

__version__ = "0.1.0"
