"""Admits, schedules, collates, runs and splits requests."""
