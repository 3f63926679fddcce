"""``--quantization moeq``: reads a checkpoint's config and gives each layer its method."""

import re
from pathlib import Path
from typing import Any

import torch

from vllm_moeq.compat import (
    QUANTIZATION_METHODS,
    LinearBase,
    ParallelLMHead,
    QuantizationConfig,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
    UnquantizedLinearMethod,
    VocabParallelEmbedding,
    change_new_models,
    compressed_tensors_method,
    extract_layer_index,
    guard_loading,
    init_logger,
    model_path,
    num_hidden_layers,
    register_quantization_config,
    run_linear_layers_on_cpus,
    set_embedding_method,
    weights_are_dummies,
)
from vllm_moeq.embedding import MoeqEmbeddingMethod
from vllm_moeq.format import (
    MANIFEST_NAME,
    QUANT_METHOD,
    CheckpointConfig,
    FormatError,
    LayerBits,
    check_manifest,
    linear_tensors,
    to_compressed_tensors,
)
from vllm_moeq.linear import PACKED_COLUMNS, prepare, run
from vllm_moeq.load_check import must_bring_all, must_fill
from vllm_moeq.moe_method import MoeqMoEMethod

logger = init_logger(f"vllm.{__name__}")  # vLLM configures only loggers below its own

_LAYER_INDEX = re.compile(r"\.layers\.(\d+)\.")


def register_config() -> None:
    """Register :class:`MoeqConfig` with vLLM; a second call does nothing."""
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        change_new_models(QUANT_METHOD, MoeqConfig.pack_embeddings)
        guard_loading(QUANT_METHOD, must_fill, must_bring_all)
        register_quantization_config(QUANT_METHOD)(MoeqConfig)


def drafts_tokens(prefix: str, index: int) -> bool:
    """Say whether a layer is one for multi-token prediction, which stays in 16 bits.

    Such layers are under a name of their own, or come after the model's own layers.
    """
    return "mtp" in prefix.split(".") or index >= num_hidden_layers()


class MoeqConfig(QuantizationConfig):
    """Quantization config of a moeq checkpoint.

    Args:
        config: ``quantization_config`` of the model's ``config.json``.

    Raises:
        FormatError: No config at all, or one that this version cannot read.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        if config is None:
            # vLLM calls quant_cls() when config.json has no quantization_config.
            raise FormatError(
                "--quantization moeq needs a checkpoint made by `moeq quantize`, but the model's "
                "config.json has no quantization_config. Convert the model first, or serve it "
                "without --quantization"
            )
        self.plan = CheckpointConfig.from_dict(config).plan
        self._by_layer: dict[int, LayerBits] = {}
        for container, bits in self.plan.expert_bits.items():
            match = _LAYER_INDEX.search(f".{container}.")
            if match is None:
                raise FormatError(f"expert_bits[{container!r}] names no layer ('layers.N')")
            if self._by_layer.setdefault(int(match[1]), bits) is not bits:
                raise FormatError(f"expert_bits names layer {match[1]} twice")
        # What vLLM calls a dense layer: its name on disk, and its width.
        self._linear = {name: (name, bits) for name, bits in self.plan.linear_bits.items()}
        self._files_checked = False

    def get_name(self) -> str:
        """Return the name used on the command line."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Return the activation types that the kernels take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the lowest CUDA compute capability: the torch reference runs everywhere."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file: the config is part of ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MoeqConfig":
        """Build from ``quantization_config``."""
        return cls(config)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Learn what a model of vLLM calls the layers that the checkpoint names."""
        # Names are added: models within models map one after another what they know. Some know
        # only how names of tensors begin or end.
        tensors = {f"{name}.weight": value for name, value in self._linear.items()}
        self._linear |= hf_to_vllm_mapper.apply_dict(self._linear) | {
            name.removesuffix(".weight"): value
            for name, value in hf_to_vllm_mapper.apply_dict(tensors).items()
        }

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method for a layer, or None to leave it to vLLM.

        Raises:
            FormatError: An MoE layer that the plan does not name, a fused layer whose parts it
                gives different widths, or damaged files.
        """
        if isinstance(layer, RoutedExperts):
            self._check_files()
            index = extract_layer_index(prefix)
            if drafts_tokens(prefix, index):
                return UnquantizedFusedMoEMethod(layer.moe_config)
            if index not in self._by_layer:
                raise FormatError(
                    f"{prefix}: the checkpoint's expert_bits has no entry for layer {index}; it "
                    f"has layers {sorted(self._by_layer)}. The plan belongs to another model"
                )
            return MoeqMoEMethod(layer.moe_config, self._by_layer[index], self.plan.group_size)
        if isinstance(layer, LinearBase):
            return self._linear_method(layer, prefix) or UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            return self._linear_method(layer, prefix)
        return None

    def pack_embeddings(self, model: torch.nn.Module) -> bool:
        """Give the embeddings and the output head of a model that is built their methods.

        Several models of vLLM do not ask for them, or do not say which layer they ask for.

        Returns:
            Whether any got one.
        """
        has_any = False
        for name, layer in model.named_modules():
            if isinstance(layer, VocabParallelEmbedding) and not hasattr(layer, PACKED_COLUMNS):
                method = self._linear_method(layer, name)
                if method is not None:
                    set_embedding_method(layer, method)
                    has_any = True
        return has_any

    def _linear_method(self, layer: Any, prefix: str) -> Any:
        """Return the method of a dense layer that the plan names, None for another."""
        parts = self._parts(prefix)
        named = [self._linear[part] for part in parts if part in self._linear]
        if not named:
            return None
        bits = named[0][1]
        if len(named) < len(parts) or any(width != bits for _, width in named):
            widths = {part: self._linear.get(part, (part, 16))[1] for part in parts}
            raise FormatError(
                f"{prefix}: vLLM runs its parts as one layer, but the checkpoint gives them "
                f"different bits: {widths}. Convert the model with one width for them"
            )
        self._check_files()
        embeds = isinstance(layer, VocabParallelEmbedding)
        columns = layer.embedding_dim if embeds else layer.input_size
        try:
            (_, _, shape), *_ = linear_tensors(1, columns, bits, self.plan.group_size)
        except FormatError as error:
            raise FormatError(f"{prefix}: {error}. The plan belongs to another model") from error
        setattr(layer, PACKED_COLUMNS, {f"{name}.weight_packed": shape[1] for name, _ in named})
        if embeds and not isinstance(layer, ParallelLMHead):
            return MoeqEmbeddingMethod(bits, self.plan.group_size)
        run_linear_layers_on_cpus(QUANT_METHOD, prepare, run)
        config = to_compressed_tensors({prefix: bits}, self.plan.group_size)
        assert config is not None
        return compressed_tensors_method(layer, prefix, config)

    def _parts(self, prefix: str) -> list[str]:
        """Return the layers that one of vLLM is made of, most often only itself."""
        if prefix in self._linear:
            return [prefix]
        parent, dot, name = prefix.rpartition(".")
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(name, [name])]

    def _check_files(self) -> None:
        """Compare the sizes of the weight files with the manifest before anything is loaded.

        safetensors' own message about a truncated file does not name it.
        """
        if self._files_checked or weights_are_dummies():
            return
        self._files_checked = True
        folder = Path(model_path())
        if not folder.is_dir():  # a hub id: the hub client has checked what it downloaded
            return
        if not (folder / MANIFEST_NAME).is_file():
            logger.warning("%s has no %s: its files are not checked", folder, MANIFEST_NAME)
            return
        problems = check_manifest(folder, weight_sizes_only=True)
        if problems:
            raise FormatError(
                f"{folder} is damaged: {'; '.join(problems)}. Copy or convert the model again"
            )
