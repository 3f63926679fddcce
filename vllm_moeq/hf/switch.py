"""The experts of Switch Transformers, each a module of its own: as they are, and packed."""

from typing import Any

import torch
from torch.nn import Module, ModuleDict, Parameter

from vllm_moeq.format import Projection
from vllm_moeq.hf.experts import FusedExperts, PackedExperts

_FIRST = "expert_0"


def is_switch_experts(module: Module) -> bool:
    """Say whether a module holds a module for each expert, with ``wi`` and ``wo``."""
    return isinstance(module, ModuleDict) and hasattr(module, _FIRST) and _is_dense(module[_FIRST])


def _is_dense(expert: Module) -> bool:
    return hasattr(expert, "wi") and hasattr(expert, "wo")


class SwitchExperts(FusedExperts):
    """Experts of a Switch Transformer, as if they were fused."""

    @classmethod
    def of(cls, name: str, module: Module) -> "SwitchExperts":
        """Take a module; they have no gate and no biases."""
        return cls(name, module, transposed=False, gated=False, alternating=False, biased=False)

    def initialized(self, model: Module) -> list[Any]:
        """Return the experts, and what is around them, which would initialize them as well."""
        around = model.get_submodule(self.name.rpartition(".")[0])
        return [around, *self.module.modules()]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, and rows and columns of what each has as ``wo``."""
        return len(self.module), *self.module[_FIRST].wo.weight.shape

    def weight(self, projection: Projection, expert: int) -> Parameter:
        """Return the weight of an expert."""
        dense = self.module[f"expert_{expert}"]
        weight: Parameter = (dense.wi if projection == "w13" else dense.wo).weight
        return weight

    def act(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute what is between both projections."""
        result: torch.Tensor = self.module[_FIRST].act(hidden)
        return result

    def packed(self, *args: Any) -> "PackedSwitchExperts":
        """Return what stands in their place; arguments are those of its class."""
        return PackedSwitchExperts(self, *args)


class PackedSwitchExperts(PackedExperts):
    """Packed experts of a Switch Transformer, of which a token gets one or none."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor | None = None,
        routing_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what each token's expert gives [T, hidden_size], zeros without one.

        Args:
            hidden_states: Tokens [T, hidden_size].
            selected_experts: One-hot [T, 1, E]; all zero beyond the capacity of an expert.
            routing_weights: Router weights [T, 1].
        """
        assert selected_experts is not None
        ids = torch.where(selected_experts.any(-1), selected_experts.argmax(-1), -1)
        return super().forward(hidden_states, ids, routing_weights)
