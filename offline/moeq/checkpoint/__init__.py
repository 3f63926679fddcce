"""Checkpoints on disk: read tensor by tensor, written whole or not at all, verified."""

from moeq.checkpoint.families import Matrix, MoELayer
from moeq.checkpoint.reader import CheckpointReader
from moeq.checkpoint.source import SourceModel

__all__ = ["CheckpointReader", "Matrix", "MoELayer", "SourceModel"]
