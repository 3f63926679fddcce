"""The analytical setting: a two-layer MoE with expert-choice routing that learns rare patterns.

A reconstruction of the setting of Chowdhury et al., "Efficient Quantization of Mixture-of-Experts
with Theoretical Generalization Guarantees" (arXiv 2604.06515); README.md says what is assumed.
Tokens are orthonormal patterns, so a weight vector is given by its products with the patterns, and
a token by the number of its pattern. Many independent runs are trained at once: tensors have a
leading axis for them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

CLASS_OF_TASK = (1.0, 1.0, -1.0, -1.0)
"""Label that each task pattern decides. Patterns 0 and 2 are frequent, 1 and 3 rare."""
RARE = (1, 3)
_TASKS = len(CLASS_OF_TASK)


@dataclass(frozen=True, slots=True)
class Setting:
    """Sizes and learning rates.

    Attributes:
        patterns: Number of patterns; all but four are irrelevant.
        sequence: Tokens in a sequence.
        capacity: Tokens that each expert chooses from a sequence.
        per_task: Experts that begin with a preference for each of the four task patterns.
        idle: Further experts, an even number, which begin without any preference.
        neurons: Neurons of an expert.
        weight_std: Standard deviation of the initial expert weights (on a pattern).
        preference: Router weight that an expert begins with on its own pattern.
        expert_rate: Learning rate of the experts.
        router_rate: Learning rate of the routers.
        batch: Sequences in a step.
    """

    patterns: int = 32
    sequence: int = 8
    capacity: int = 2
    per_task: int = 2
    idle: int = 0
    neurons: int = 16
    weight_std: float = 0.01
    preference: float = 0.3
    expert_rate: float = 1.6
    router_rate: float = 0.1
    batch: int = 64

    @property
    def experts(self) -> int:
        """Number of experts."""
        return _TASKS * self.per_task + self.idle

    @property
    def own_pattern(self) -> torch.Tensor:
        """The task pattern that each expert prefers at first, -1 for idle ones [experts]."""
        tasks = torch.arange(_TASKS).repeat_interleave(self.per_task)
        return torch.cat([tasks, torch.full((self.idle,), -1)])

    @property
    def output_sign(self) -> torch.Tensor:
        """The fixed output weight of each expert, +1 or -1 [experts]."""
        tasks = torch.tensor(CLASS_OF_TASK).repeat_interleave(self.per_task)
        return torch.cat([tasks, 1.0 - 2.0 * (torch.arange(self.idle) % 2)])

    @property
    def is_rare(self) -> torch.Tensor:
        """Whether an expert's own pattern is rare, bool [experts]."""
        return torch.isin(self.own_pattern, torch.tensor(RARE))

    @property
    def is_frequent(self) -> torch.Tensor:
        """Whether an expert's own pattern is frequent, bool [experts]."""
        return ~self.is_rare & (self.own_pattern >= 0)


class Sequences(NamedTuple):
    """Labelled sequences.

    Attributes:
        tokens: Pattern of each token [runs, batch, sequence].
        labels: +1 or -1 [runs, batch].
        rare: Whether the task pattern is a rare one, bool [runs, batch].
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    rare: torch.Tensor


class Weights(NamedTuple):
    """What is trained, as products with the patterns.

    Attributes:
        router: [runs, experts, patterns].
        experts: First layer of each expert [runs, experts, neurons, patterns].
    """

    router: torch.Tensor
    experts: torch.Tensor


class Routing(NamedTuple):
    """What every expert chose.

    Attributes:
        chosen: Patterns of the tokens [runs, experts, batch, capacity].
        gates: Weights of their answers, softmax of the router scores, of the same shape.
    """

    chosen: torch.Tensor
    gates: torch.Tensor


def draw(
    rare_rate: torch.Tensor, size: int, setting: Setting, generator: torch.Generator
) -> Sequences:
    """Draw sequences with one task pattern each, at a random place among irrelevant ones.

    Args:
        rare_rate: Probability that a class shows its rare pattern (the paper's alpha) [runs].
        size: Sequences for each run.
        setting: Sizes.
        generator: Source of randomness.
    """
    runs = len(rare_rate)
    negative = torch.rand(runs, size, generator=generator) < 0.5
    rare = torch.rand(runs, size, generator=generator) < rare_rate[:, None]
    shape = (runs, size, setting.sequence)
    tokens = torch.randint(_TASKS, setting.patterns, shape, generator=generator)
    place = torch.randint(setting.sequence, (runs, size, 1), generator=generator)
    tokens.scatter_(2, place, (2 * negative + rare.long())[..., None])
    return Sequences(tokens, 1.0 - 2.0 * negative, rare)


def draw_test(runs: int, setting: Setting, generator: torch.Generator) -> Sequences:
    """Draw sequences to measure with; half of them are rare."""
    return draw(torch.full((runs,), 0.5), 1000, setting, generator)


def mean_where(where: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the mean of some values of each run [runs], both arguments being [runs, batch]."""
    return (values * where).sum(1) / where.sum(1)


def initial_weights(runs: int, setting: Setting, generator: torch.Generator) -> Weights:
    """Return weights before training: each expert has a weak preference for its own pattern."""
    own = setting.own_pattern
    router = 0.01 * torch.randn(runs, len(own), setting.patterns, generator=generator)
    specialised = own >= 0
    router[:, specialised, own[specialised]] += setting.preference
    shape = (runs, len(own), setting.neurons, setting.patterns)
    return Weights(router, setting.weight_std * torch.randn(shape, generator=generator))


def answers(experts: torch.Tensor) -> torch.Tensor:
    """Return what each expert answers to each pattern: the mean of its ReLU neurons.

    Args:
        experts: [runs, experts, neurons, patterns].
    """
    return experts.relu().mean(2)


def route(router: torch.Tensor, tokens: torch.Tensor, capacity: int) -> Routing:
    """Let every expert choose the tokens of each sequence with its largest router scores.

    Args:
        router: [runs, experts, patterns].
        tokens: [runs, batch, sequence].
        capacity: Tokens that an expert chooses.
    """
    runs, size, _ = tokens.shape
    experts = router.shape[1]
    flat = tokens.view(runs, 1, -1).expand(-1, experts, -1)
    scores, place = router.gather(2, flat).view(runs, experts, size, -1).topk(capacity)
    chosen = tokens[:, None].expand(-1, experts, -1, -1).gather(3, place)
    return Routing(chosen, scores.softmax(-1))


def forward(routing: Routing, experts: torch.Tensor, setting: Setting) -> torch.Tensor:
    """Return the model's outputs [runs, batch]; their sign is the predicted class.

    Every expert weighs its answers to the tokens that it chose; experts are added with fixed signs.
    """
    answer = answers(experts).gather(2, routing.chosen.flatten(2)).view_as(routing.gates)
    return ((routing.gates * answer).sum(-1) * setting.output_sign[:, None]).sum(1)


def margins(weights: Weights, data: Sequences, setting: Setting) -> torch.Tensor:
    """Return label times output [runs, batch]: positive if right, 1 where the hinge ends."""
    routing = route(weights.router, data.tokens, setting.capacity)
    return data.labels * forward(routing, weights.experts, setting)


def train(
    start: Weights,
    rare_rate: torch.Tensor,
    setting: Setting,
    stops: Iterable[int],
    generator: torch.Generator,
) -> Iterator[Weights]:
    """Train by SGD on the hinge loss of fresh batches; yield the weights at each stop (in steps).

    Args:
        start: Weights before training.
        rare_rate: Probability of the rare patterns [runs].
        setting: Sizes and learning rates.
        stops: Steps, ascending.
        generator: Source of randomness.
    """
    weights = Weights(*(part.clone().requires_grad_() for part in start))
    done = 0
    for stop in stops:
        for _ in range(stop - done):
            data = draw(rare_rate, setting.batch, setting, generator)
            loss = (1 - margins(weights, data, setting)).relu().mean(-1).sum()
            router, experts = torch.autograd.grad(loss, list(weights))
            with torch.no_grad():
                weights.router.sub_(setting.router_rate * router)
                weights.experts.sub_(setting.expert_rate * experts)
        done = stop
        yield Weights(*(part.detach().clone() for part in weights))


def norm_change(start: Weights, now: Weights) -> torch.Tensor:
    """Return Lambda, the change of each expert's router l2 norm [runs, experts]."""
    return now.router.norm(dim=-1) - start.router.norm(dim=-1)


def rare_first_auc(change: torch.Tensor, setting: Setting) -> torch.Tensor:
    """Return for each run how surely a rare expert has the smaller Lambda than a frequent one.

    1 if all of them have, 0.5 by chance [runs].

    Args:
        change: Lambda [runs, experts].
        setting: Says which experts are rare.
    """
    rare = change[:, setting.is_rare, None]
    frequent = change[:, None, setting.is_frequent]
    return ((rare < frequent).float() + 0.5 * (rare == frequent)).mean((1, 2))
