"""The routed experts of one layer: as transformers holds them, and packed in their place."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import Module, Parameter

from vllm_moeq.expert_buffers import (
    WEIGHT_BUFFERS,
    ExpertBuffers,
    Kind,
    Share,
    check_hidden_size,
)
from vllm_moeq.format import PROJECTIONS, FormatError, LayerBits, Projection
from vllm_moeq.hf.packed import OFFLOADED, ForwardOnly, refuse_to_move
from vllm_moeq.kernels import (
    ACTIVATIONS,
    KERNELS,
    SWIGLU,
    ExpertLayout,
    ExpertWeights,
    SwiGlu,
    activate,
    expert_weight,
    fused_experts,
    select_kernel,
)


def is_fused_experts(module: Module) -> bool:
    """Say whether a module holds the matrices of all experts in one parameter for each kind."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, Parameter) and down.ndim == 3


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """Experts of transformers, E of them: ``gate_up_proj`` or ``up_proj``, and ``down_proj``.

    Attributes:
        name: Of the module.
        module: Holds the parameters.
        transposed: They are [E, inputs, outputs] instead of [E, outputs, inputs].
        gated: Experts have a gate.
        alternating: Rows of gate and up alternate.
        biased: Each matrix has a bias.
    """

    name: str
    module: Any
    transposed: bool
    gated: bool
    alternating: bool
    biased: bool

    @classmethod
    def of(cls, name: str, module: Module) -> "FusedExperts":
        """Read what transformers' decorator says; Llama-4's class alone has none."""
        return cls(
            name,
            module,
            transposed=getattr(module, "is_transposed", True),
            gated=getattr(module, "has_gate", True),
            alternating=not getattr(module, "is_concatenated", True),
            biased=getattr(module, "has_bias", False),
        )

    def initialized(self, model: Module) -> list[Any]:
        """Return the modules of a model that transformers is to leave as they are."""
        return [self.module]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, and rows and columns of what each has as ``down_proj``."""
        experts, rows, columns = self.module.down_proj.shape
        return experts, rows, columns

    def weight(self, projection: Projection, expert: int) -> torch.Tensor:
        """Return the weight of an expert, as it is stored."""
        weight: torch.Tensor = getattr(self.module, self._name(projection))[expert]
        return weight

    def _name(self, projection: Projection) -> str:
        if projection == "w2":
            return "down_proj"
        return "gate_up_proj" if self.gated else "up_proj"

    def act(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute what is between both projections of an expert without a gate."""
        result: torch.Tensor = self.module.act_fn(hidden)
        return result

    def packed(self, bits: LayerBits, group_size: int) -> "PackedExperts":
        """Return what stands in their place; see its class."""
        return PackedExperts(self, bits, group_size)

    def buffers(self, bits: LayerBits, group_size: int) -> ExpertBuffers:
        """Describe the same experts packed.

        Raises:
            FormatError: The plan belongs to another model.
        """
        experts, rows, columns = self.shape
        hidden, intermediate = (columns, rows) if self.transposed else (rows, columns)
        if experts != bits.num_experts:
            raise FormatError(
                f"{self.name}: expert_bits lists {bits.num_experts} experts, the model has "
                f"{experts}. The plan belongs to another model"
            )
        check_hidden_size(self.name, group_size, hidden)
        share = Share.of_rank(self.name, group_size, intermediate, 0, 1)
        layout = ExpertLayout.build(
            w13_bits=list(bits.w13),
            w2_bits=list(bits.w2),
            group_size=group_size,
            hidden_size=hidden,
            intermediate_size=share.size,
            gated=self.gated,
        )
        return ExpertBuffers(
            self.name, layout, share, biased=self.biased, alternating=self.alternating
        )

    @torch.no_grad()
    def dequantize(
        self, buffers: ExpertBuffers, tensors: dict[tuple[Projection, Kind], torch.Tensor]
    ) -> None:
        """Fill the parameters with packed weights.

        Args:
            buffers: Describes the packed experts.
            tensors: As :meth:`ExpertBuffers.allocate` made them, filled.

        Raises:
            ValueError: The device map puts the parameters on no device.
        """
        weights = ExpertWeights(*(tensors[key] for key in tensors if key[1] != "bias"))
        for projection in PROJECTIONS:
            for expert in range(len(buffers.layout.slots)):
                target = self.weight(projection, expert)
                if target.is_meta:
                    raise ValueError(OFFLOADED.format(name=self.name))
                weight = expert_weight(buffers.layout, weights, projection, expert, torch.float32)
                if projection == "w13":
                    weight = self._stored_rows(weight, buffers.share)
                else:
                    weight = weight[:, : buffers.share.columns]
                target.copy_(weight.T if self.transposed else weight)
                if self.biased:
                    bias = tensors[projection, "bias"][expert]
                    if projection == "w13":
                        bias = self._stored_rows(bias, buffers.share)
                    getattr(self.module, f"{self._name(projection)}_bias")[expert].copy_(bias)

    def _stored_rows(self, w13: torch.Tensor, share: Share) -> torch.Tensor:
        """Return the rows of gate and up without the zeros that fill a last group."""
        if self.gated and not self.alternating:
            return torch.cat([half[: share.columns] for half in w13.chunk(2)])
        return w13[: share.columns * (2 if self.gated else 1)]

    def activation(self) -> tuple[str, SwiGlu | None]:
        """Return the kernels' activation that gives what the model's own gives.

        Raises:
            FormatError: There is none.
        """
        module = self.module
        # Further than limits of clamped activations are.
        probe = torch.linspace(-30, 30, 96, dtype=torch.float32, device="cpu").view(4, -1)
        if not self.gated:
            expected = self.act(probe)
        elif hasattr(module, "_apply_gate"):
            expected = module._apply_gate(probe)
        else:
            gate, up = probe.chunk(2, -1)
            expected = module.act_fn(gate) * up
        for name in ACTIVATIONS:
            if name.endswith("_no_mul") == self.gated:
                continue
            for swiglu in self._swiglus(name):
                if torch.allclose(activate(probe, name, swiglu), expected, rtol=1e-5, atol=1e-6):
                    return name, swiglu
        raise FormatError(
            f"{self.name}: no kernel has the activation of {type(module).__name__}; load the model "
            "with `quantization_config=MoeqConfig(dequantize=True)`"
        )

    def _swiglus(self, name: str) -> list[SwiGlu | None]:
        """Return what an activation may take of the model; with and without 1 added to up."""
        usual, module = SWIGLU.get(name), self.module
        if usual is None:
            return [None]
        limit = getattr(module, "limit", getattr(module, "swiglu_limit", usual.limit))
        alpha = getattr(module, "alpha", getattr(module, "swiglu_alpha", usual.alpha))
        return [SwiGlu(limit, alpha, beta) for beta in (0.0, 1.0)]


class PackedExperts(Module):
    """Packed experts in the place of fused ones.

    Its tensors are buffers that ``state_dict`` does not list: once prepared, only one kernel can
    read them. ``save_pretrained`` takes those of the checkpoint.

    Args:
        fused: What it replaces.
        bits: Widths of the experts.
        group_size: Weights of a row that share a scale.

    Raises:
        FormatError: The plan or its group size does not fit, or no kernel has the activation.
    """

    def __init__(self, fused: FusedExperts, bits: LayerBits, group_size: int) -> None:
        super().__init__()
        self.num_experts = bits.num_experts
        self.buffers_of_layer = fused.buffers(bits, group_size)
        self.activation, self.swiglu = fused.activation()
        # On the meta device: transformers moves them to where its device map says.
        for (projection, kind), tensor in self.buffers_of_layer.allocate().items():
            self.register_buffer(f"{projection}_{kind}", tensor.to("meta"), persistent=False)
        self.layout = self.buffers_of_layer.layout.to_tensor()  # no buffer: it stays on the CPU

    def canonical(self) -> dict[tuple[Projection, Kind], torch.Tensor]:
        """Return the buffers by matrix and kind, to be filled.

        Raises:
            ValueError: The device map puts them on no device.
        """
        names = {
            (projection, kind): getattr(self, f"{projection}_{kind}")
            for projection in PROJECTIONS
            for kind in self.buffers_of_layer.kinds
        }
        if any(tensor.is_meta for tensor in names.values()):
            raise ValueError(OFFLOADED.format(name=self.buffers_of_layer.name))
        return names

    def prepare(self) -> None:
        """Repack the buffers, which are filled, for the kernel of their device.

        Raises:
            ValueError: ``MOEQ_KERNEL`` names a kernel that cannot run there.
        """
        weights = ExpertWeights(*(getattr(self, name) for name in WEIGHT_BUFFERS))
        kernel = select_kernel(weights.w13_packed.device)
        layout = replace(self.buffers_of_layer.layout, kernel=kernel)
        prepared = KERNELS[kernel].prepare(weights, layout, self.activation)
        for name, tensor in zip(WEIGHT_BUFFERS, prepared, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.layout = layout.to_tensor()

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the sum of each token's experts [T, hidden_size].

        Args:
            hidden_states: Tokens [T, hidden_size]; without the others, as Llama-4 calls it, [E, T]
                tokens one after another, scaled for each expert and zero for those not chosen.
            top_k_index: Experts [T, top_k].
            top_k_weights: Router weights [T, top_k].
        """
        if top_k_index is None or top_k_weights is None:
            experts = torch.arange(self.num_experts, device=hidden_states.device)
            rows = experts.repeat_interleave(len(hidden_states) // self.num_experts)
            chosen = hidden_states.any(-1)
            top_k_index = torch.where(chosen, rows, -1).unsqueeze(-1)
            top_k_weights = torch.ones_like(top_k_index, dtype=torch.float32)
        result: torch.Tensor = ForwardOnly.apply(  # type: ignore[no-untyped-call]
            self._run, hidden_states, top_k_index, top_k_weights
        )
        return result

    def _run(
        self, hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        result: torch.Tensor = fused_experts(
            hidden_states,
            weights.float(),
            ids.int(),
            [getattr(self, name) for name in WEIGHT_BUFFERS],
            getattr(self, "w13_bias", None),
            getattr(self, "w2_bias", None),
            self.layout,
            None,
            self.activation,
            False,
            *(self.swiglu or (None, None, None)),
        )
        return result

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Module:
        """Refuse to move; a change of type, as of ``model.to(torch.bfloat16)``, is none of ours."""
        here = self.get_buffer(WEIGHT_BUFFERS[0]).device
        refuse_to_move(here, fn)
        return self
