"""How far a quantized model is from its original, judged on held-out text."""

from moeq.evaluation.packed import PackedModel
from moeq.evaluation.scores import Evaluation, Scores

__all__ = ["Evaluation", "PackedModel", "Scores"]
