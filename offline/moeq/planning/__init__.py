"""Bit plans that are measured on the model itself."""
