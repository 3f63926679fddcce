"""Rounds experts with what they get."""
