"""One table: how each model family names its MoE tensors on disk."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moeq.errors import MoeqError
from vllm_moeq.format import BitPlan, Projection

Matrix = Literal["gate", "up", "down"]
_NAMES_TOLD = 6
_LIKE_EXPERTS = re.compile("expert|moe|router")
_LAYER = r"layers\.(?P<index>\d+)\."
_BLOCK = r"(?P<stack>encoder|decoder)\.block\.(?P<index>\d+)\.layer\.\d+\."
"""Match the end of the path of what has experts: a decoder layer; a part of a block of T5."""
FOUND_BY_TESTS = Path(__file__).with_name("families.json")
"""What tests found of each model type; they write it (``tests/support/family_table.py``)."""


@dataclass(frozen=True, slots=True)
class Family:
    """What one family calls its MoE tensors, once they are a matrix each.

    Attributes:
        model_types: ``model_type`` values of ``config.json``.
        experts: Path of the experts container inside a decoder layer.
        router: Path of the router weight inside a decoder layer.
        gate: Name of an expert's gate projection; None if its experts have none.
        up: Name of its up projection.
        down: Name of its down projection.
        aliases: Starts of other names inside a decoder layer, as transformers or older releases
            save them, each with what stands here instead. The first that fits holds.
        biased: Whether each matrix of an expert has a bias.
        interleaved: Whether the rows of gate and up alternate where they are fused.
        activations: What ``config.json`` may call the activation of experts: vLLM takes many for
            granted, whatever is there.
        norm: Path of the norm in front of its experts inside a decoder layer; empty if none is.
        normalized: Whether what its experts give together is normalized, or multiplied, before it
            is added to the residual stream.
        scaled_inputs: Whether router weights scale what its experts get, instead of what they give.
        runs_as: Another ``model_type``, as which transformers runs the same model.
        layer: Matches the path of a layer, in which the paths above are.
        encodes: Whether it is an encoder and a decoder, which vLLM does not have: such models run
            in transformers alone. The layers of the decoder come after those of the encoder.
        top_k: Experts of a token, where ``config.json`` does not tell.
        derived: Whether it is no row here, but made of what transformers says (``derived.py``).
    """

    model_types: tuple[str, ...]
    experts: str
    router: str
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    aliases: tuple[tuple[str, str], ...] = ()
    biased: bool = False
    interleaved: bool = False
    activations: tuple[str, ...] = ("silu",)
    norm: str = "post_attention_layernorm"
    normalized: bool = False
    scaled_inputs: bool = False
    runs_as: str | None = None
    layer: str = _LAYER
    encodes: bool = False
    top_k: int | None = None
    derived: bool = False

    @property
    def projections(self) -> dict[Projection, tuple[Matrix, ...]]:
        """The matrices of an expert that share a width, and the same inputs."""
        return {"w13": ("up",) if self.gate is None else ("gate", "up"), "w2": ("down",)}

    @property
    def example(self) -> str:
        """The path of a layer, to be shown."""
        return "encoder.block.N.layer.1." if self.encodes else "model.layers.N."

    def tensor_name(self, container: str, expert: int, matrix: Matrix, kind: str = "weight") -> str:
        """Return the name of an expert's tensor: a ``weight``, a ``bias``, or what is packed."""
        return f"{container}.{expert}.{getattr(self, matrix)}.{kind}"

    def canonical_name(self, name: str) -> str:
        """Return what a tensor on disk is called here."""
        match = self.match(name)
        layer, inside = ("", name) if match is None else (match["path"], match["inside"])
        for alias, canonical in self.aliases:
            if inside.startswith(alias):
                return f"{layer}{canonical}{inside.removeprefix(alias)}"
        return name

    def match(self, name: str) -> re.Match[str] | None:
        """Cut a name into the ``path`` of a layer, with its ``index``, and what is ``inside``."""
        return re.match(rf"(?P<path>.*\b{self.layer})(?P<inside>.*)", name)

    def layer_index(self, config: Mapping[str, Any], name: str) -> int:
        """Return the number of a tensor's layer in the order in which layers run.

        Args:
            config: ``config.json``.
            name: Of a tensor in a layer.

        Raises:
            MoeqError: The encoder has no such layer.
        """
        match = self.match(name)
        if match is None:
            raise MoeqError(f"{name} is in no layer of the model")
        index = int(match["index"])
        if not self.encodes:
            return index
        before = config.get("num_layers")
        if not isinstance(before, int) or (match["stack"] == "encoder" and index >= before):
            raise MoeqError(
                f"{name} is of no layer of the model: config.json has num_layers {before}"
            )
        return index + (before if match["stack"] == "decoder" else 0)


FAMILIES: tuple[Family, ...] = (
    Family(
        ("mixtral", "minimax_m2", "phimoe"),
        experts="block_sparse_moe.experts",
        router="block_sparse_moe.gate.weight",
        gate="w1",
        up="w3",
        down="w2",
        aliases=(("mlp.router.", "block_sparse_moe.gate."), ("mlp.", "block_sparse_moe.")),
    ),
    Family(
        (
            "qwen2_moe",
            "qwen3_moe",
            "qwen3_vl_moe",
            "qwen3_next",
            "qwen3_5_moe",
            "qwen3_5_moe_text",
            "olmoe",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe",
            "glm4_moe_lite",
            "dots1",
            "ernie4_5_moe",
            "mimo_v2_flash",
            "glm_moe_dsa",
            "glm5_next",
        ),
        experts="mlp.experts",
        router="mlp.gate.weight",
        aliases=(
            ("mlp.gate.moe_statics.", "mlp.moe_statics."),
            ("self_attn.sinks", "self_attn.attention_sink_bias"),
        ),
    ),
    Family(
        ("minimax_m3_vl",),
        experts="block_sparse_moe.experts",
        router="block_sparse_moe.gate.weight",
        gate="w1",
        up="w3",
        down="w2",
        # transformers saves dense layers, and those of vision, under the name of the others.
        aliases=(
            ("block_sparse_moe.gate_proj.", "mlp.gate_proj."),
            ("block_sparse_moe.up_proj.", "mlp.up_proj."),
            ("block_sparse_moe.down_proj.", "mlp.down_proj."),
            ("block_sparse_moe.fc1.", "mlp.fc1."),
            ("block_sparse_moe.fc2.", "mlp.fc2."),
        ),
        activations=("swigluoai", "silu"),
        normalized=True,
    ),
    Family(
        ("deepseek_v4",),
        experts="ffn.experts",
        router="ffn.gate.weight",
        gate="w1",
        up="w3",
        down="w2",
    ),
    Family(
        ("kimi_k2",),
        experts="mlp.experts",
        router="mlp.gate.weight",
        runs_as="deepseek_v3",
    ),
    Family(
        ("flex_olmo",),
        experts="mlp.experts",
        router="mlp.gate.weight",
        norm="",
        normalized=True,
    ),
    Family(("hunyuan_v1_moe",), experts="mlp.experts", router="mlp.gate.wg.weight"),
    Family(
        ("lfm2_moe",),
        experts="feed_forward.experts",
        router="feed_forward.gate.weight",
        gate="w1",
        up="w3",
        down="w2",
        norm="ffn_norm",
    ),
    Family(
        ("granitemoe", "granitemoeshared"),
        experts="block_sparse_moe.experts",
        router="block_sparse_moe.router.layer.weight",
        aliases=(
            ("block_sparse_moe.input_linear.weight", "block_sparse_moe.experts.gate_up_proj"),
            ("block_sparse_moe.output_linear.weight", "block_sparse_moe.experts.down_proj"),
            ("block_sparse_moe.router.weight", "block_sparse_moe.router.layer.weight"),
        ),
    ),
    Family(
        ("gpt_oss",),
        experts="mlp.experts",
        router="mlp.router.weight",
        biased=True,
        interleaved=True,
    ),
    Family(
        ("llama4", "llama4_text"),
        experts="feed_forward.experts",
        router="feed_forward.router.weight",
        scaled_inputs=True,
    ),
    Family(
        ("gemma4", "gemma4_text"),
        experts="experts",
        router="router.proj.weight",
        activations=("gelu_pytorch_tanh",),
        norm="pre_feedforward_layernorm_2",
        normalized=True,
    ),
    Family(
        ("nemotron_h",),
        experts="mixer.experts",
        router="mixer.gate.weight",
        gate=None,
        activations=("relu2", "silu", "gelu", "gelu_pytorch_tanh"),
        norm="norm",
    ),
    Family(
        ("switch_transformers",),
        experts="mlp.experts",
        router="mlp.router.classifier.weight",
        gate=None,
        up="wi",
        down="wo",
        aliases=(("mlp.experts.expert_", "mlp.experts."),),
        activations=("relu",),
        norm="layer_norm",
        layer=_BLOCK,
        encodes=True,
        top_k=1,
    ),
)


def family_of(config: Mapping[str, Any], tensors: Collection[str] = ()) -> Family:
    """Return the family of a model's ``config.json``: its row here, or what transformers says.

    Args:
        config: What is in it.
        tensors: Names in the checkpoint, of which those that look like experts are told.

    Raises:
        MoeqError: The model is no supported MoE model.
    """
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    from moeq.checkpoint.derived import derived_family  # it makes rows of this module

    try:
        derived = derived_family(json.dumps(config))
    except MoeqError as error:
        reason = f". {error}"
    else:
        if derived is not None:
            return derived
        reason = ""
    known = sorted(name for family in FAMILIES for name in family.model_types)
    message = (
        f"model_type {model_type!r} in config.json is no supported Mixture-of-Experts family; "
        f"supported: {', '.join(known)}{reason}"
    )
    # Layers and experts are alike: one name of each kind tells how to describe the model.
    kinds = {re.sub(r"\.\d+\.", ".N.", name) for name in tensors if _LIKE_EXPERTS.search(name)}
    if kinds:
        message += (
            f". Its experts are {', '.join(sorted(kinds)[:_NAMES_TOLD])}: a row in "
            "moeq/checkpoint/families.py would describe them (README.md beside it)"
        )
    raise MoeqError(message)


@dataclass(frozen=True, slots=True)
class MoELayer:
    """One MoE layer of a checkpoint.

    Attributes:
        index: Its number in the order in which layers run; those of a decoder come after those of
            its encoder.
        container: On-disk path of its experts, the key in a plan's ``expert_bits``.
        router: On-disk name of its router weight [num_experts, hidden_size].
        family: Names of the projections.
        num_experts: Routed experts.
        hidden_size: Columns of gate and up.
        intermediate_size: Rows of gate and up.
    """

    index: int
    container: str
    router: str
    family: Family
    num_experts: int
    hidden_size: int
    intermediate_size: int

    @property
    def projections(self) -> dict[Projection, tuple[Matrix, ...]]:
        """As of its family."""
        return self.family.projections

    def tensor_name(self, expert: int, matrix: Matrix) -> str:
        """Return the on-disk name of one weight."""
        return self.family.tensor_name(self.container, expert, matrix)

    def bias_name(self, expert: int, matrix: Matrix) -> str:
        """Return the on-disk name of one bias, if the family has any."""
        return self.family.tensor_name(self.container, expert, matrix, "bias")

    def shape(self, matrix: Matrix) -> tuple[int, int]:
        """Return (rows, columns) of one weight."""
        if matrix == "down":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size

    def added_columns(self, group_size: int) -> int:
        """Return the columns of zeros that serving adds to down, to make its last group whole."""
        return -self.intermediate_size % group_size

    def weights(self) -> Iterator[tuple[int, Matrix, Projection]]:
        """Yield (expert, matrix, projection whose width it takes) of every routed weight."""
        for expert in range(self.num_experts):
            for projection, matrices in self.projections.items():
                for matrix in matrices:
                    yield expert, matrix, projection

    @property
    def expert_weights(self) -> int:
        """Number of weights of one expert."""
        matrices = sum(map(len, self.projections.values()))
        return matrices * self.hidden_size * self.intermediate_size


def expert_widths(plan: BitPlan, layers: list[MoELayer]) -> dict[str, int]:
    """Return the width of every routed weight by its name on disk."""
    return {
        layer.tensor_name(expert, matrix): plan.expert_bits[layer.container].width(
            projection, expert
        )
        for layer in layers
        for expert, matrix, projection in layer.weights()
    }
