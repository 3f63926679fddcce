"""Runs models layer by layer, on text."""
