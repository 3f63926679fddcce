"""Plans that are right on the user's own model: measured, and judged on text held back."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError

from moeq.allocation import (
    PlanOptions,
    allocate,
    average_bits,
    bits_budget,
    fulfils,
    make_plan,
    ordered_bits,
    plan_sizes,
    possible_group_sizes,
    with_sizes,
)
from moeq.checkpoint.families import MoELayer, check_group_size
from moeq.checkpoint.reader import CheckpointReader
from moeq.checkpoint.workspace import begin, check_space, clear, replace_file, work_on
from moeq.errors import MoeqError
from moeq.evaluation import Evaluation, Scores
from moeq.evaluation.reference import ExpertSource, outputs
from moeq.evaluation.scores import Scorer
from moeq.model.layerwise import LayerwiseModel
from moeq.planning.cost import (
    expert_weights,
    experts_of_a_token,
    forward_operations,
    gptq_operations,
    hessian_operations,
    measuring_bytes,
    working_bytes,
)
from moeq.rounding import DATA_FREE
from moeq.sensitivity.bank import Bank, build
from moeq.sensitivity.fisher import gradients
from moeq.signals import load_base_routers, router_norms
from moeq.signals.table import PMQ, Evidence
from vllm_moeq._version import __version__
from vllm_moeq.format import WIDTHS, BitPlan, Provenance

RANDOM_PLANS = 3
"""Random plans that ``auto`` tries."""
_PLANS_AT_ONCE = 12
"""That are judged together: activations of all of them are in memory."""
_WAY = 2
"""To be raised when the same work gives another plan: unfinished runs cannot go on then."""
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
        size: Bytes that the experts may take, if it is not the average width that was asked for.
    """

    reader: CheckpointReader
    layers: list[MoELayer]
    options: PlanOptions
    source: str
    tokens: torch.Tensor
    method: str
    device: torch.device
    seed: int = 0
    size: int | None = None

    def _fingerprint(self) -> dict[str, Any]:
        """Return what the plan depends on."""
        return work_on(self.reader, self.tokens, str(self.device)) | {
            "way of measuring": _WAY,
            "choice of options for the plan": asdict(self.options),
            "initial router": self._router_changes(),
            "size": self.size,
            "method": self.method,
            "seed": self.seed,
        }

    def _router_changes(self) -> dict[str, list[float]]:
        """Return the change of each expert's router norm, by container, if it is to be used."""
        if self.options.base_router is None:
            return {}
        base = load_base_routers(self.options.base_router, self.layers)
        return {
            layer.container: router_norms(self.reader, layer, base).values.tolist()
            for layer in self.layers
        }

    @property
    def disk_bytes(self) -> int:
        """Bytes of temporary files: experts at every width, and activations of every layer."""
        return measuring_bytes(self.layers, self.widths, self.group_sizes, self.tokens.numel())

    @property
    def peak_memory_bytes(self) -> int:
        """Estimate of the memory in use beyond Python and torch themselves."""
        layer = max(self.layers, key=expert_weights)
        count, size = self.tokens.numel(), 4 * layer.hidden_size
        together = 4 * layer.num_experts * expert_weights(layer)  # for gradients, in float32
        alone = working_bytes(layer) + count * (4 * size + 12 * layer.intermediate_size)
        judged = 2 * (1 + _PLANS_AT_ONCE) * self._held_back * self.tokens.shape[1] * size
        return max(4 * count * size + max(together, alone), judged)

    @property
    def operations(self) -> float:
        """About how many floating-point operations measuring takes; attention is left out."""
        layer, widths = self.layers[0], len(self.widths)
        routed = experts_of_a_token(self.reader.config, layer) * len(self.layers)
        held_back = self._held_back * self.tokens.shape[1]
        # Forward for the gradients, and back; in the bank, whole and at each width of a projection.
        groups = len(self.group_sizes)
        measuring = self.tokens.numel() - held_back
        passes = (1 + 3 + groups * (2 + 2 * widths)) * measuring
        passes += (1 + _PLANS_AT_ONCE) * held_back
        total = passes * routed * forward_operations(layer)
        if self.method in DATA_FREE:
            return total
        hessians = measuring * routed * hessian_operations(layer)
        return total + groups * (hessians + gptq_operations(self.layers, widths))

    @property
    def _held_back(self) -> int:
        """Number of sequences that judge plans."""
        return int(len(self.tokens) * _HELD_BACK) if self.options.strategy == "auto" else 0

    def check(self) -> tuple[list[BitPlan], int, list[int]]:
        """Find out in a moment what could fail after hours.

        Returns:
            Plans to try that need no measurement, the bytes that all plans may take, and the group
            sizes with which there is a plan.

        Raises:
            MoeqError: Options that do not fit the model, or too little text.
        """
        if self.options.strategy == "auto" and not self._held_back:
            raise MoeqError(
                f"--strategy auto needs at least {round(1 / _HELD_BACK)} calibration sequences, "
                f"there are {len(self.tokens)}: give more text or a smaller --seqlen"
            )
        for group_size in self.group_sizes:
            check_group_size(group_size, self.layers)
        self.options.constraints.check(len(self.layers))
        others: list[BitPlan] = []
        if self._held_back:
            others = list(filter(self._is_wanted, self._unmeasured()))
        budget = self._budget
        for plan in others[:1]:  # its bits are whole experts: all are to take the same bytes
            budget = plan_sizes(plan, self.reader, self.layers).expert_bytes
        possible = possible_group_sizes(
            self.group_sizes, self.layers, self.widths, budget, self.options.constraints
        )
        return others, budget, possible

    def run(self, progress: bool = True) -> tuple[BitPlan, list[Candidate]]:
        """Return the plan, and what ``auto`` tried, the best first.

        Raises:
            MoeqError: As :meth:`check`; weights or activations that are not finite; or a full disk.
        """
        with TemporaryDirectory(prefix="moeq-") as name, _disk_errors(Path(name)):
            return self._run(Path(name), progress)

    def run_in(self, folder: Path, progress: bool = True) -> tuple[BitPlan, list[Candidate]]:
        """Do the same in a folder that outlives a kill, and go on with what is there.

        Args:
            folder: Gets what is finished, and at last only the plan.
            progress: Show progress bars.

        Returns:
            As :meth:`run`; a plan that was there already comes without what was tried.

        Raises:
            MoeqError: As :meth:`run`; or what is there is of another plan.
        """
        kept, measurement = folder / "plan.json", folder / "measurement"
        tried: list[Candidate] = []
        with _disk_errors(folder):
            begin(folder / "fingerprint.json", self._fingerprint())
            if kept.exists():
                plan = BitPlan.from_dict(json.loads(kept.read_text()))
            else:
                measurement.mkdir(exist_ok=True)
                try:
                    plan, tried = self._run(measurement, progress)
                except BaseException:  # Ctrl-C, too
                    if not any(measurement.glob("*/*.json")):  # nothing to go on with
                        clear(folder)
                    raise
                text = json.dumps(plan.to_dict())
                replace_file(kept, lambda target: target.write_text(text))
        shutil.rmtree(measurement, ignore_errors=True)
        return plan, tried

    def _run(self, folder: Path, progress: bool) -> tuple[BitPlan, list[Candidate]]:
        """Measure, choose and judge."""
        others, budget, group_sizes = self.check()
        for path in folder.glob("*.bin"):  # activations of a killed run, which are made anew
            path.unlink()
        check_space(self.disk_bytes, folder)
        model = LayerwiseModel(self.reader, self.layers, self.device)
        tokens = self.tokens[self._held_back :]
        felt = gradients(model, tokens, folder, self.seed, progress)
        banks = {}
        for group_size in group_sizes:
            (part := folder / str(group_size)).mkdir(exist_ok=True)
            banks[group_size] = build(
                model, tokens, self.widths, group_size, self.method, felt, part, progress
            )
        measured = self._measured(banks, budget)
        if not self._held_back:
            return measured, []
        by_traffic = self._by_traffic(model, banks[max(banks)])
        plans = [measured, *others, *filter(self._is_wanted, by_traffic)]
        judged = {"held back": self.tokens[: self._held_back]}
        sources = [banks[plan.group_size].source(plan, self.device) for plan in plans]
        found = judge(model, sources, judged, progress)
        tried = [
            Candidate(plan, evaluation.total) for plan, evaluation in zip(plans, found, strict=True)
        ]
        tried.sort(key=lambda candidate: candidate.scores.divergence)
        best = tried[0].plan
        provenance = replace(best.provenance, strategy=f"auto: {best.provenance.strategy}")
        return replace(best, provenance=provenance), tried

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths to choose from: those asked for, or a few around the average."""
        if self.options.levels:
            return tuple(sorted(self.options.levels))
        averages = [
            average_bits(self._budget, self.layers, group_size) for group_size in self.group_sizes
        ]
        levels = {
            level
            for average in (self.options.bits, *averages)
            if average >= WIDTHS[0]
            for level in replace(self.options, bits=average).resolved_levels()
        }
        first = max(0, WIDTHS.index(min(levels)) - 1)
        return WIDTHS[first : WIDTHS.index(max(levels)) + 2]

    @property
    def _budget(self) -> int:
        """Bytes that the experts may take, with the largest of several group sizes."""
        if self.size is not None:
            return self.size
        return bits_budget(self.options.bits, self.layers, self.options.group_size)

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Group sizes to choose from."""
        return self.options.group_sizes or (self.options.group_size,)

    def _measured(self, banks: Mapping[int, Bank], budget: int) -> BitPlan:
        """Return the plan of least estimated loss within the budget."""
        tables = {group_size: bank.losses("loss") for group_size, bank in banks.items()}
        group_size, bits, solution = allocate(
            tables, self.layers, self.widths, budget, self.options.constraints
        )
        provenance = Provenance(
            strategy="sensitivity",
            requested_bits=self.options.bits,
            source=self.source,
            moeq_version=__version__,
            details={
                "widths": list(self.widths),
                "group_sizes": list(self.group_sizes),
                "constraints": str(self.options.constraints),
                "estimated_divergence": solution.loss,
                "gap_to_the_best_plan": solution.gap,
            },
        )
        return with_sizes(BitPlan(group_size, bits, provenance), self.reader, self.layers)

    def _unmeasured(self) -> Iterator[BitPlan]:
        """Yield plans of the same bytes that need no measurement."""
        asked = self.options
        plain = PlanOptions(asked.bits, asked.levels, group_size=asked.group_size)
        routers = {
            name: getattr(asked, name) for name in ("base_router", "zeta", "maxvar", "reorder")
        }
        yield self._made(replace(plain, strategy="combined", **routers))
        if asked.levels is None and asked.bits in WIDTHS:
            yield self._made(replace(plain, strategy="uniform"))
            return
        yield self._made(replace(plain, strategy="maxvar", maxvar=asked.maxvar))
        for seed in range(self.seed, self.seed + RANDOM_PLANS):
            yield self._made(replace(plain, strategy=f"random:{seed}"))

    def _by_traffic(self, model: LayerwiseModel, bank: Bank) -> Iterator[BitPlan]:
        """Yield the plan of PMQ, which needs frequencies, router weights and weight errors."""
        levels = self.options.resolved_levels()
        if len(levels) == 1:
            return  # the uniform plan
        values = PMQ.compute(Evidence(model, None, bank, min(levels)), self.layers)
        bits = {
            container: ordered_bits(PMQ.order(found), self.options.bits, levels)
            for container, found in values.items()
        }
        provenance = Provenance(
            strategy=PMQ.name,
            requested_bits=self.options.bits,
            source=self.source,
            moeq_version=__version__,
            details={"levels": list(levels)},
        )
        plan = BitPlan(self.options.group_size, bits, provenance)
        yield with_sizes(plan, self.reader, self.layers)

    def _is_wanted(self, plan: BitPlan) -> bool:
        return fulfils(plan, self.layers, self.options.constraints)

    def _made(self, options: PlanOptions) -> BitPlan:
        return make_plan(self.reader, self.layers, options, self.source)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Name the folder when its disk is full or fails."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise MoeqError(f"cannot measure in {folder}: {error}") from error


def judge(
    model: LayerwiseModel,
    sources: Sequence[ExpertSource],
    sequences: dict[str, torch.Tensor],
    progress: bool = True,
) -> list[Evaluation]:
    """Compare sets of experts with the model's own, on the same text, some at a time.

    Args:
        model: The model.
        sources: Sets of experts.
        sequences: Text to its tokens, int64 [n, L], all of one length L.
        progress: Show progress bars.
    """
    names = [name for name, tokens in sequences.items() for _ in tokens]
    tokens = torch.cat(list(sequences.values()))
    found: list[Evaluation] = []
    for first in range(0, len(sources), _PLANS_AT_ONCE):
        some = sources[first : first + _PLANS_AT_ONCE]
        scorers = [Scorer() for _ in some]
        said = outputs(model, [ExpertSource.original(model), *some], tokens, progress)
        for name, sequence, (original, *answers) in zip(names, tokens, said, strict=True):
            for scorer, answer in zip(scorers, answers, strict=True):
                scorer.add(name, sequence, original, answer)
        found += [scorer.result() for scorer in scorers]
    return found
