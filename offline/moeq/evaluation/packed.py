"""A packed checkpoint beside its original, judged on texts."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from moeq.checkpoint import CheckpointReader, SourceModel
from moeq.checkpoint.fits import check_plan_fits
from moeq.checkpoint.linear import group_widths, linear_widths
from moeq.checkpoint.packed import PackedReader
from moeq.errors import MoeqError
from moeq.evaluation import reference, served
from moeq.evaluation.scores import Evaluation, Output, Scorer, TopOutput
from moeq.evaluation.whole import WholeModel
from moeq.model import ExpertSource, LayerwiseModel, layerwise_model
from moeq.model.sequences import answered
from moeq.model.structure import check_structure
from moeq.progress import Progress, silent
from vllm_moeq.format import BitPlan


@dataclass(frozen=True, slots=True)
class PackedModel:
    """A packed checkpoint and its original.

    Attributes:
        reader: Reads the packed checkpoint.
        plan: Its widths.
        original: The model that it comes from.
    """

    reader: CheckpointReader
    plan: BitPlan
    original: SourceModel

    @classmethod
    def open(cls, folder: Path, original: SourceModel) -> "PackedModel":
        """Open a packed checkpoint beside its original.

        Raises:
            MoeqError: It is no packed checkpoint, one that lacks tensors, or one of another model;
                names it.
        """
        reader = PackedReader(folder)
        try:
            check_plan_fits(reader.plan, original.layers)
            group_widths(reader.plan, original.linear)
        except MoeqError as error:
            raise MoeqError(f"{folder} does not come from {original.folder}: {error}") from error
        check_structure(reader, original.layers)
        return cls(reader, reader.plan, original)

    def evaluate(
        self,
        sequences: dict[str, torch.Tensor],
        backend: str,
        device: torch.device,
        dtype: str = "auto",
        progress: Progress = silent,
    ) -> Evaluation:
        """Judge the packed checkpoint on texts.

        Args:
            sequences: Text to its tokens, int64 [n, L], all of one length L.
            backend: One of :data:`moeq.requests.BACKENDS`. ``reference`` runs layer by layer from
                disk, ``transformers`` whole models in memory; both in float32 with dequantized
                experts. ``vllm`` serves the packed checkpoint.
            device: Where models run, except under vLLM.
            dtype: Of vLLM.
            progress: Called after every layer that runs from disk.

        Raises:
            MoeqError: A model gives values that are not finite, or the backend cannot run it.
        """
        names = [name for name, tokens in sequences.items() for _ in tokens]
        tokens = torch.cat(list(sequences.values()))
        scorer = Scorer()
        outputs = self._outputs(tokens, backend, device, dtype, progress)
        for name, sequence, original, quantized in zip(names, tokens, *outputs, strict=True):
            places = answered(self.original.reader.config, sequence)
            scorer.add(name, sequence[places], original, quantized)
        return scorer.result()

    def _outputs(
        self,
        tokens: torch.Tensor,
        backend: str,
        device: torch.device,
        dtype: str,
        progress: Progress,
    ) -> tuple[Iterable[Output], Iterable[Output | TopOutput]]:
        """Return what the original and the packed checkpoint say to each sequence."""
        if backend == "vllm" and self.original.layers[0].family.encodes:
            raise MoeqError(
                f"`backend` vllm: vLLM has no {self.original.reader.config['model_type']}; use "
                "reference or transformers"
            )
        experts = ExpertSource.packed(self.reader, self.plan, device)
        if backend == "transformers":
            packed = WholeModel(self.original, device)
            packed.fill(experts)
            packed.fill_linear(
                {name: self.reader.tensor(name) for name in linear_widths(self.plan)}
            )
            original = WholeModel(self.original, device)
            return original.outputs(tokens), packed.outputs(tokens)
        quantized: Iterable[Output | TopOutput]
        if backend == "vllm":  # first, since it may be missing
            quantized = served.outputs(str(self.reader.folder), tokens, dtype)
        else:
            # Everything but the experts is read from the packed checkpoint, too.
            rest = SourceModel(str(self.reader.folder), self.reader, self.original.layers)
            quantized = _of_one(layerwise_model(rest, device), experts, tokens, progress)
        model = layerwise_model(self.original, device)
        return _of_one(model, ExpertSource.original(model), tokens, progress), quantized


def _of_one(
    model: LayerwiseModel, source: ExpertSource, tokens: torch.Tensor, progress: Progress
) -> Iterable[Output]:
    return (output for (output,) in reference.outputs(model, [source], tokens, progress))
