"""End-to-end distillation of a quantized model: scales and routers learn, codes stay as they are.

The quantized model is trained to give the original's distribution of the next token on calibration
text, as in Malinovskii et al., "PV-Tuning" (2024), of which this is only the continuous half. For
models that fit into memory with their gradients.
"""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from plan_quality import PlannedModel
from torch.func import functional_call

from moeq.checkpoint.families import MoELayer, expert_widths
from moeq.rounding import QuantizedWeight
from vllm_moeq.format import BitPlan, unpack, zero_point_unit

_SEQUENCES = 4
"""In a batch."""
_WARM_UP = 10
_BETAS = (0.9, 0.95)

Stored = dict[str, QuantizedWeight]


@torch.no_grad()
def last_hidden(model: PlannedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return what the output matrix gets, float32 [n, L, hidden_size], for tokens [n, L]."""
    body = model.model.model
    parts = [body(part, use_cache=False).last_hidden_state for part in tokens.split(_SEQUENCES)]
    return torch.cat(parts)


class LearnedScales:
    """Experts whose groups' scales are multiplied with learned factors.

    Attributes:
        logs: Logarithms of the factors, by the name of the parameter of transformers that holds
            the matrices of all experts: float32 [E, rows, groups].
    """

    def __init__(self, layers: list[MoELayer], plan: BitPlan, stored: Stored) -> None:
        self._widths = expert_widths(plan, layers)
        self._stored = stored
        self._names: dict[str, list[str]] = {}
        for layer in layers:
            prefix, experts = f"layers.{layer.index}.mlp.experts", range(layer.num_experts)
            self._names[f"{prefix}.gate_up_proj"] = [
                layer.tensor_name(expert, matrix) for expert in experts for matrix in ("gate", "up")
            ]  # fmt: skip
            self._names[f"{prefix}.down_proj"] = [
                layer.tensor_name(expert, "down") for expert in experts
            ]
        self.logs: dict[str, torch.Tensor] = {}
        self._steps, self._scales = {}, {}
        for parameter, names in self._names.items():
            experts = layers[0].num_experts
            steps = torch.stack([self._in_steps(name) for name in names])
            scales = torch.stack([stored[name].scale.float() for name in names])
            self._steps[parameter] = steps.view(experts, -1, *steps.shape[2:])
            self._scales[parameter] = scales.view(experts, -1, scales.shape[2])
            self.logs[parameter] = torch.zeros_like(self._scales[parameter]).requires_grad_()

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the experts' weights by the names of transformers' parameters."""
        return {
            name: (steps * (self._scales[name] * self.logs[name].exp())[..., None]).flatten(2)
            for name, steps in self._steps.items()
        }

    def stored(self) -> Stored:
        """Return what the format stores."""
        result = {}
        for parameter, names in self._names.items():
            scales = (self._scales[parameter] * self.logs[parameter].detach().exp()).half()
            for name, scale in zip(names, scales.flatten(0, 1).chunk(len(names)), strict=True):
                result[name] = self._stored[name]._replace(scale=scale.contiguous())
        return result

    def _in_steps(self, name: str) -> torch.Tensor:
        """Return weights divided by their scales, float32 [N, groups, group_size]."""
        weight, bits = self._stored[name], self._widths[name]
        zero = weight.zero_point.float() * zero_point_unit(bits)
        codes = unpack(weight.packed, bits).float()
        return codes.view(*zero.shape, -1) - zero[..., None]


def distill(
    model: PlannedModel,
    tokens: torch.Tensor,
    teacher: torch.Tensor,
    scales: LearnedScales,
    routers: Mapping[str, torch.Tensor],
    rates: tuple[float, float],
    steps: int,
    seed: int = 0,
) -> None:
    """Minimize the Kullback-Leibler divergence from the original's next-token distribution.

    Args:
        model: Gives everything that is not learned.
        tokens: int64 [n, L].
        teacher: What the original's output matrix gets for them, see :func:`last_hidden`.
        scales: Learned in place.
        routers: By transformers' names without "model.", learned in place.
        rates: Peak learning rates of Adam for scales and routers; what has rate 0 stays.
        steps: Of four sequences each; the rate falls as a cosine.
        seed: Of the order of sequences.
    """
    groups = [
        {"params": parameters, "peak": rate, "lr": rate}
        for parameters, rate in zip((_list(scales.logs), _list(routers)), rates, strict=True)
        if rate
    ]
    optimizer = torch.optim.Adam(groups, betas=_BETAS)
    model.model.requires_grad_(False)
    head, body = model.model.lm_head.weight, model.model.model
    with torch.no_grad():
        fixed = scales.weights()
    for step, pick in zip(range(steps), _batches(len(tokens), seed), strict=False):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / _WARM_UP)
            group["lr"] = group["peak"] * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        weights = {**(scales.weights() if rates[0] else fixed), **routers}
        arguments = {"input_ids": tokens[pick], "use_cache": False}
        output = functional_call(body, weights, args=(), kwargs=arguments).last_hidden_state
        loss = F.kl_div(
            (output @ head.T).log_softmax(-1).flatten(0, 1),
            (teacher[pick] @ head.T).log_softmax(-1).flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _list(parameters: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    return [parameter.requires_grad_() for parameter in parameters.values()]


def _batches(count: int, seed: int) -> Iterable[torch.Tensor]:
    """Yield places of sequences for ever, each once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from (part for part in order.split(_SEQUENCES) if len(part) == _SEQUENCES)
