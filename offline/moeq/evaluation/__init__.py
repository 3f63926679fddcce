"""``moeq eval``: how far a quantized model is from its original, judged on held-out text."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from moeq.checkpoint.families import check_plan_fits
from moeq.checkpoint.reader import CheckpointReader
from moeq.checkpoint.verify import read_plan
from moeq.errors import MoeqError
from moeq.evaluation import reference, served
from moeq.evaluation.reference import ExpertSource
from moeq.evaluation.scores import Evaluation, Output, Scorer, Scores, TopOutput
from moeq.evaluation.whole import WholeModel
from moeq.model.layerwise import LayerwiseModel
from vllm_moeq.format import BitPlan

__all__ = ["BACKENDS", "Comparison", "Evaluation", "Scores", "load"]

BACKENDS = ("reference", "transformers", "vllm")
"""``reference`` runs layer by layer from disk, ``transformers`` whole models in memory; both in
float32 with dequantized experts. ``vllm`` serves the packed checkpoint."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A packed checkpoint and its original.

    Attributes:
        packed: Reads the packed checkpoint.
        plan: Its widths.
        original: Reads the original.
        device: Where models run, except under vLLM.
    """

    packed: CheckpointReader
    plan: BitPlan
    original: CheckpointReader
    device: torch.device

    def evaluate(
        self, sequences: dict[str, torch.Tensor], backend: str, dtype: str = "auto"
    ) -> Evaluation:
        """Judge the packed checkpoint on texts.

        Args:
            sequences: Text to its tokens, int64 [n, L], all of one length L.
            backend: One of :data:`BACKENDS`.
            dtype: Of vLLM.

        Raises:
            MoeqError: A model gives values that are not finite, or the backend cannot run it.
        """
        names = [name for name, tokens in sequences.items() for _ in tokens]
        tokens = torch.cat(list(sequences.values()))
        scorer = Scorer()
        for name, sequence, original, found in zip(
            names, tokens, *self._outputs(tokens, backend, dtype), strict=True
        ):
            scorer.add(name, sequence, original, found)
        return scorer.result()

    def _outputs(
        self, tokens: torch.Tensor, backend: str, dtype: str
    ) -> tuple[Iterable[Output], Iterable[Output | TopOutput]]:
        """Return what the original and the packed checkpoint say to each sequence."""
        layers = self.original.moe_layers()
        source = ExpertSource.packed(self.packed, self.plan, self.device)
        if backend == "transformers":
            packed = WholeModel(self.original.folder, layers, self.device)
            packed.fill(source)
            original = WholeModel(self.original.folder, layers, self.device)
            return original.outputs(tokens), packed.outputs(tokens)
        found: Iterable[Output | TopOutput]
        if backend == "vllm":  # first, since it may be missing
            found = served.outputs(str(self.packed.folder), tokens, dtype)
        else:
            model = LayerwiseModel(self.packed, layers, self.device)
            found = (one for (one,) in reference.outputs(model, [source], tokens))
        model = LayerwiseModel(self.original, layers, self.device)
        own = ExpertSource.original(model)
        return (one for (one,) in reference.outputs(model, [own], tokens)), found


def load(packed: Path, original: CheckpointReader, device: torch.device) -> Comparison:
    """Open a packed checkpoint beside its original.

    Raises:
        MoeqError: It is no packed checkpoint, or one of another model; names it.
    """
    reader = CheckpointReader(packed)
    plan = read_plan(reader)
    try:
        check_plan_fits(plan, original.moe_layers())
    except MoeqError as error:
        raise MoeqError(f"{packed} does not come from {original.folder}: {error}") from error
    return Comparison(reader, plan, original, device)
