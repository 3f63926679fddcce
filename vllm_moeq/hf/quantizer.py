"""What transformers calls while it loads and saves a packed checkpoint."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.quantizers.base import HfQuantizer

from vllm_moeq.format import TRANSFORMERS_GUARD, BitPlan, CheckpointConfig, FormatError, first_few
from vllm_moeq.hf.config import MoeqConfig
from vllm_moeq.hf.experts import FusedExperts, is_fused_experts
from vllm_moeq.hf.files import PackedFiles
from vllm_moeq.hf.linear import (
    PackedEmbedding,
    PackedLinear,
    dequantize,
    layout_of,
    packed_layer,
)
from vllm_moeq.hf.saving import save_pretrained
from vllm_moeq.hf.switch import SwitchExperts, is_switch_experts
from vllm_moeq.kernels import LinearLayout

_LAYER = re.compile(r"\.(?:layers|(?:encoder|decoder)\.block)\.\d+\.")
_PACKED_TENSORS = {
    r"\.experts\.\d+\.\w+\.(weight_packed|weight_scale|weight_zero_point|bias)$",
    r"\.(weight_packed|weight_scale|weight_shape)$",  # of dense layers
}
_UNEXPECTED, _MISSING = "_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing"
"""Patterns of names, attributes of a model."""


class MoeqHfQuantizer(HfQuantizer):
    """Replaces or fills what is packed; everything else is loaded as of any checkpoint.

    Raises:
        ValueError: The model was not packed by ``moeq quantize``.
    """

    quantization_config: MoeqConfig
    pre_quantized: bool

    def __init__(self, quantization_config: MoeqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "MoeqConfig is for checkpoints that `moeq quantize` has written; convert the model "
                "with it first"
            )
        # Else transformers leaves every tensor that has another name on disk in the type it has
        # there. But ours are plain tensors, to be cast like those of a plain checkpoint.
        self.pre_quantized = False
        self.plan: BitPlan = CheckpointConfig.from_dict(quantization_config.checkpoint).plan

    @property
    def is_trainable(self) -> bool:
        """No: the kernels have no backward pass."""
        return False

    def is_serializable(self) -> bool:
        """Say that ``save_pretrained`` works."""
        return True

    # Whichever of these two a release of transformers calls, it does so before it looks for files.
    def update_tp_plan(self, config: Any) -> Any:
        """Take the guard out of the configuration, now that it has done its duty."""
        return self.update_attn_implementation(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """Do the same."""
        for part in (config, config.get_text_config()):
            for key in TRANSFORMERS_GUARD:
                if hasattr(part, key):
                    delattr(part, key)
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise ValueError("packed weights are read from safetensors files, not a `state_dict`")
        self.files = PackedFiles(checkpoint_files, self.plan)
        self._fused = dict(self._find_experts(model))
        self._linears = dict(self._find_linears(model))
        # Restored after loading.
        self._ignored = {name: getattr(model, name) for name in (_UNEXPECTED, _MISSING)}
        unexpected, missing = set(_PACKED_TENSORS), set()
        for container, fused in self._fused.items():
            bits = self.plan.expert_bits[container]
            # Their parameters get a place, and no random values.
            for module in fused.initialized(model):
                module._is_hf_initialized = True
            if self.quantization_config.dequantize:
                missing.add(f"^{re.escape(fused.name)}\\.")
            else:
                packed = fused.packed(bits, self.plan.group_size)
                model.set_submodule(fused.name, packed)
        for stored, (name, layout) in self._linears.items():
            module = model.get_submodule(name)
            if self.quantization_config.dequantize:
                module._is_hf_initialized = True
                missing.add(f"^{re.escape(name)}\\.weight$")
            else:
                model.set_submodule(name, packed_layer(stored, module, layout))
        setattr(model, _UNEXPECTED, unexpected.union(self._ignored[_UNEXPECTED] or ()))
        setattr(model, _MISSING, missing.union(self._ignored[_MISSING] or ()))
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def _find_experts(self, model: Any) -> Iterator[tuple[str, FusedExperts]]:
        """Yield the container on disk and the experts of each layer."""
        by_layer: dict[str, str] = {}
        for container in self.plan.expert_bits:
            layer = _layer(container)
            if by_layer.setdefault(layer, container) != container:
                raise FormatError(f"expert_bits names {layer} twice")
        for name, module in list(model.named_modules()):
            kind = _kind(module)
            if kind is not None:
                container = by_layer.pop(_layer(name), "")
                if not container:
                    raise FormatError(
                        f"expert_bits has no entry for {name}: the plan belongs to another model"
                    )
                yield container, kind.of(name, module)
        if by_layer:
            raise FormatError(
                f"expert_bits names {next(iter(by_layer.values()))}, and this release of "
                "transformers holds no fused experts there"
            )

    def _find_linears(self, model: Any) -> Iterator[tuple[str, tuple[str, LinearLayout]]]:
        """Yield the name on disk of each dense layer, its name in memory, and its sizes."""
        if not self.plan.linear_bits:
            return
        ours = model.state_dict()
        renamings = _renamings(get_model_conversion_mapping(model))
        tied = getattr(model, "all_tied_weights_keys", {})
        for stored, bits in self.plan.linear_bits.items():
            weight = _name_in_memory(f"{stored}.weight", renamings, model, ours)
            name = weight.removesuffix(".weight")
            if weight in tied:
                raise FormatError(f"linear_bits names {stored}, which shares {tied[weight]}")
            module = model.get_submodule(name) if weight in ours else None
            yield stored, (name, layout_of(stored, module, bits, self.plan.group_size))

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: Any = None
    ) -> list[Any]:
        """Leave out how transformers fuses experts: it would take packed tensors for weights."""
        self._conversions = weight_conversions
        return [
            entry
            for entry in weight_conversions
            if isinstance(entry, WeightRenaming) or not _makes_experts(entry)
        ]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for name, patterns in self._ignored.items():
            setattr(model, name, patterns)
        self._check_placement(model)
        self._check_the_rest(model)
        with self.files.opened() as read:
            for container, fused in self._fused.items():
                if self.quantization_config.dequantize:
                    bits = self.plan.expert_bits[container]
                    buffers = fused.buffers(bits, self.plan.group_size)
                    tensors = buffers.allocate()
                    self.files.fill(container, buffers, tensors, read)
                    fused.dequantize(buffers, tensors)
                else:
                    packed = model.get_submodule(fused.name)
                    self.files.fill(container, packed.buffers_of_layer, packed.canonical(), read)
                    packed.prepare()
            for stored, (name, layout) in self._linears.items():
                weight = self.files.linear_weight(stored, layout, read)
                module = model.get_submodule(name)
                if isinstance(module, PackedLinear | PackedEmbedding):
                    module.fill(weight)
                else:
                    dequantize(stored, module, layout, weight)
        if self.quantization_config.dequantize:
            self._forget(model)
        else:
            self._names = self._names_in_memory(model)
            self._tied = dict(getattr(model, "all_tied_weights_keys", {}))
            self._not_stored = set(model.state_dict()) - set(self._names.values())
            model.save_pretrained = MethodType(save_pretrained, model)
        del self._fused, self._linears, self._shapes, self._conversions

    def _check_placement(self, model: Any) -> None:
        if getattr(model, "_tp_size", None) is not None:
            raise ValueError("packed weights are not split over ranks in transformers; use vLLM")
        places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
        offloaded = places & {"cpu", "disk"}
        if offloaded and places - offloaded:
            raise ValueError(
                f"the device map leaves parts of the model on {', '.join(sorted(offloaded))} and "
                "moves them to a GPU when needed, which packed weights cannot follow: use more "
                "GPUs, or the CPU alone"
            )

    def _check_the_rest(self, model: Any) -> None:
        """Check what transformers has loaded; it only warns of what it has not.

        Raises:
            FormatError: A tensor is missing or has another shape.
        """
        tied = set(getattr(model, "all_tied_weights_keys", {}))
        ours = tuple(f"{fused.name}." for fused in self._fused.values())
        tied |= {f"{name}.weight" for name, _ in self._linears.values()}
        optional = self._ignored[_MISSING] or ()
        wrong = []
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in tied or name.startswith(ours):
                continue
            if any(re.search(pattern, name) for pattern in optional):
                continue
            # transformers marks so what it has loaded.
            if not getattr(tensor, "_is_hf_initialized", False) and not tensor.is_meta:
                wrong.append(f"{name} is missing")
            elif tensor.shape != self._shapes[name]:
                wrong.append(f"{name} is {list(tensor.shape)}, not {list(self._shapes[name])}")
        if wrong:
            raise FormatError(
                f"{self.files.folder}: {first_few(wrong)}. Check it with `moeq verify`"
            )

    def _names_in_memory(self, model: Any) -> dict[str, str]:
        """Return what transformers calls the tensors on disk that are no experts'."""
        ours = model.state_dict()
        renamings = _renamings(self._conversions)
        names = (
            (stored, _name_in_memory(stored, renamings, model, ours))
            for stored in self.files.others
        )
        return {stored: name for stored, name in names if name in ours}

    def _forget(self, model: Any) -> None:
        """Leave a plain model, which is saved as any other."""
        self.remove_quantization_config(model)
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._is_quantized = False
        model._weight_conversions = [
            entry for entry in self._conversions if entry.was_used() or _makes_experts(entry)
        ]

    def get_state_dict_and_metadata(
        self, model: Any
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Return all tensors under their names on disk: the packed ones as they are there.

        Raises:
            ValueError: Modules have been replaced or offloaded, or there are tensors that the
                checkpoint has no place for.
            FormatError: The files are no more as they were.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # transformers saves the adapter alone
        self._check_whole(model)
        ours = model.state_dict()
        self._check_nothing_is_new(ours)
        tensors = {}
        with self.files.opened() as read:
            for name in self.files.names:
                in_memory = self._names.get(name)
                if in_memory is None:
                    tensors[name] = read(name)
                elif in_memory not in ours or ours[in_memory].is_meta:
                    raise ValueError(
                        f"{in_memory} is gone or offloaded, so that the model cannot be saved: "
                        "merge adapters before, and load without offloading"
                    )
                else:
                    tensors[name] = ours[in_memory]
        return tensors, {}

    def _check_nothing_is_new(self, ours: dict[str, torch.Tensor]) -> None:
        for name in ours.keys() - set(self._names.values()):
            other = self._tied.get(name)
            untied = other in ours and ours[name].data_ptr() != ours[other].data_ptr()
            if untied or name not in self._not_stored:
                raise ValueError(
                    f"{name} is no tensor of {self.files.folder}, so that it would be lost: save a "
                    "model that was loaded with MoeqConfig(dequantize=True) instead"
                )

    def _check_whole(self, model: Any) -> None:
        stored = json.loads((self.files.folder / "config.json").read_text(encoding="utf-8"))
        if stored.get("model_type") != model.config.model_type:
            raise ValueError(
                f"this is a part of the {stored.get('model_type')} in {self.files.folder}, with "
                "another configuration: load the whole model to save it"
            )

    @property
    def source(self) -> Path:
        """Folder that the model was loaded from."""
        return self.files.folder


def _layer(name: str) -> str:
    match = _LAYER.search(f".{name}.")
    if match is None:
        raise FormatError(f"{name}: experts outside numbered layers ('layers.N') are not supported")
    return match[0].strip(".")


def _kind(module: Any) -> type[FusedExperts] | None:
    """Return how a module holds experts; None if it holds none."""
    if is_fused_experts(module):
        return FusedExperts
    return SwitchExperts if is_switch_experts(module) else None


def _renamings(conversions: list[Any]) -> list[WeightRenaming]:
    return [entry for entry in conversions if isinstance(entry, WeightRenaming)]


def _name_in_memory(
    stored: str, renamings: list[WeightRenaming], model: Any, ours: dict[str, torch.Tensor]
) -> str:
    """Return what transformers calls a tensor on disk."""
    name: str = rename_source_key(stored, renamings, [], model.base_model_prefix, ours)[0]
    return name


def _makes_experts(conversion: Any) -> bool:
    return any(re.search(r"\bexperts\b", pattern) for pattern in conversion.target_patterns)
