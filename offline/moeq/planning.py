"""Plans that are right on the user's own model: measured, and judged on text held back."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from moeq.allocation import (
    PlanOptions,
    bits_budget,
    layer_bits,
    loss_array,
    make_plan,
    option_sizes,
    solve,
    with_sizes,
)
from moeq.bank import Bank, build
from moeq.checkpoint import CheckpointReader
from moeq.errors import MoeqError
from moeq.evaluate import Scores
from moeq.evaluate.reference import ExpertSource, outputs
from moeq.evaluate.scores import Scorer
from moeq.families import MoELayer
from moeq.fisher import gradients
from moeq.layerwise import LayerwiseModel
from vllm_moeq._version import __version__
from vllm_moeq.format import WIDTHS, BitPlan, Provenance

RANDOM_PLANS = 3
"""Random plans that ``auto`` tries."""
_HELD_BACK = 0.25
"""Share of the calibration sequences that judge plans and are not used to make them."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that was tried.

    Attributes:
        plan: Its widths.
        scores: On the text held back.
    """

    plan: BitPlan
    scores: Scores


@dataclass(frozen=True, slots=True)
class Planner:
    """Makes plans from what rounding does to a model on a text.

    Attributes:
        reader: The checkpoint.
        layers: Its MoE layers.
        options: What is asked of the plan; the strategy is one of :data:`moeq.allocation.MEASURED`.
        source: The model as the user named it.
        tokens: int64 [n, L]: calibration text.
        method: How experts are rounded, as ``--method`` has it.
        device: Where layers run and experts are rounded.
        seed: Of random plans, and of the tokens drawn for the Fisher information.
    """

    reader: CheckpointReader
    layers: list[MoELayer]
    options: PlanOptions
    source: str
    tokens: torch.Tensor
    method: str
    device: torch.device
    seed: int = 0

    def run(self, progress: bool = True) -> tuple[BitPlan, list[Candidate]]:
        """Return the plan, and what ``auto`` tried, the best first.

        Raises:
            MoeqError: Options that do not fit the model, too little text, or weights or
                activations that are not finite.
        """
        held_back = int(len(self.tokens) * _HELD_BACK) if self.options.strategy == "auto" else 0
        if self.options.strategy == "auto" and not held_back:
            raise MoeqError(
                f"--strategy auto needs at least {round(1 / _HELD_BACK)} calibration sequences, "
                f"there are {len(self.tokens)}: give more text or a smaller --seqlen"
            )
        tokens = self.tokens[held_back:]
        model = LayerwiseModel(self.reader, self.layers, self.device)
        with TemporaryDirectory(prefix="moeq-") as name:
            folder = Path(name)
            felt = gradients(model, tokens, folder, self.seed, progress)
            bank = build(
                model, tokens, self._widths(), self.options.group_size, self.method, felt, folder,
                progress,
            )  # fmt: skip
            measured = self._measured(bank)
            if not held_back:
                return measured, []
            plans = [measured, *self._unmeasured()]
            tried = self._judged(model, bank, plans, self.tokens[:held_back], progress)
        best = tried[0].plan
        chosen = f"auto: {best.provenance.strategy}"
        return replace(best, provenance=replace(best.provenance, strategy=chosen)), tried

    def _widths(self) -> tuple[int, ...]:
        """Return the widths to choose from: those asked for, or a few around the average."""
        if self.options.levels:
            return tuple(sorted(self.options.levels))
        levels = self.options.resolved_levels()
        first = max(0, WIDTHS.index(min(levels)) - 1)
        return WIDTHS[first : WIDTHS.index(max(levels)) + 2]

    def _measured(self, bank: Bank) -> BitPlan:
        """Return the plan of least estimated loss within the budget."""
        widths, group_size = self._widths(), self.options.group_size
        budget = bits_budget(self.options.bits, self.layers, group_size, widths)
        losses = loss_array(
            {key: found.loss for key, found in bank.damage.items()}, self.layers, widths
        )
        solution = solve(losses, option_sizes(self.layers, group_size, widths), budget)
        provenance = Provenance(
            strategy="sensitivity",
            requested_bits=self.options.bits,
            source=self.source,
            moeq_version=__version__,
            details={
                "widths": list(widths),
                "estimated_divergence": solution.loss,
                "gap_to_the_best_plan": solution.gap,
            },
        )
        plan = BitPlan(group_size, layer_bits(solution.choice, self.layers, widths), provenance)
        return with_sizes(plan, self.reader, self.layers)

    def _unmeasured(self) -> Iterator[BitPlan]:
        """Yield plans of the same bytes that need no measurement."""
        plain = replace(self.options, base_router=None, levels=None)
        yield self._made(replace(self.options, strategy="combined", levels=None))
        if self.options.bits in WIDTHS:
            yield self._made(replace(plain, strategy="uniform"))
            return
        yield self._made(replace(plain, strategy="maxvar"))
        for seed in range(self.seed, self.seed + RANDOM_PLANS):
            yield self._made(replace(plain, strategy=f"random:{seed}"))

    def _made(self, options: PlanOptions) -> BitPlan:
        return make_plan(self.reader, self.layers, options, self.source)

    def _judged(
        self,
        model: LayerwiseModel,
        bank: Bank,
        plans: list[BitPlan],
        tokens: torch.Tensor,
        progress: bool,
    ) -> list[Candidate]:
        scorers = [Scorer() for _ in plans]
        sources = [ExpertSource.original(model)]
        sources += [bank.source(plan, self.device) for plan in plans]
        for sequence, (original, *found) in zip(
            tokens, outputs(model, sources, tokens, progress), strict=True
        ):
            for scorer, output in zip(scorers, found, strict=True):
                scorer.add("held back", sequence, original, output)
        tried = [
            Candidate(plan, scorer.result().total)
            for plan, scorer in zip(plans, scorers, strict=True)
        ]
        return sorted(tried, key=lambda candidate: candidate.scores.divergence)
