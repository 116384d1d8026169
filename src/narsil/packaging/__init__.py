"""Weights in, artifact out."""
