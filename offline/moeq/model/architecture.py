"""What transformers says of the model in a checkpoint: its class, and its tensors' names."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.version import Version

from moeq.checkpoint.families import Family, family_of
from moeq.checkpoint.meta import saved_names, without_code
from moeq.checkpoint.reader import read_json
from moeq.errors import MoeqError

_OLDEST_WITH_ENCODER = Version("5.19")
"""Of transformers: before, experts of Switch Transformers got their tokens in another way."""


def model_config(folder: Path) -> Any:
    """Return the configuration of a checkpoint in transformers; no code of its own is run.

    Raises:
        MoeqError: transformers does not know the model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, __version__  # takes seconds to import

    stated = read_json(folder / "config.json")
    family = family_of(stated)
    if family.encodes and Version(__version__) < _OLDEST_WITH_ENCODER:
        raise MoeqError(
            f"running {stated['model_type']} needs transformers {_OLDEST_WITH_ENCODER} or newer, "
            f"and this is {__version__}; plan and quantize with `--calib none`"
        )
    runs_as = family.runs_as
    if runs_as is not None:
        # Its own code, which it names there, is that of the other model.
        stated = {key: value for key, value in stated.items() if key != "auto_map"}
        return without_code(CONFIG_MAPPING[runs_as].from_dict(stated | {"model_type": runs_as}))
    try:
        return without_code(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except ValueError as error:
        raise MoeqError(
            f"{folder}: this release of transformers does not know the model. Plan and quantize "
            "with `--calib none`, evaluate with `--backend vllm` "
            f"({str(error).splitlines()[0]})"
        ) from error


def not_layerwise(config: Any, family: Family) -> str:
    """Return why the layers of a model cannot be run one by one; empty if they can.

    Args:
        config: Of its language model in transformers.
        family: Of the model.
    """
    if family.scaled_inputs and config.num_experts_per_tok > 1:
        return "scales what several experts get of a token"  # vLLM refuses it, too
    if max(getattr(config, name, 1) for name in ("hc_mult", "hc_count")) > 1:
        return "has several residual streams, and mixes them"
    if getattr(config, "hidden_size_per_layer_input", 0):
        return "gives each layer another embedding of the tokens"
    if getattr(config, "num_kv_shared_layers", 0):
        return "shares keys and values between layers"
    return ""


def stored_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the names of tensors on disk by the names of parameters in memory.

    Routed experts, which transformers fuses, keep their names on disk.

    Args:
        model: Of transformers.
        names: Of all tensors in a checkpoint.
    """
    # transformers gives these two to PEFT, and names no others.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    ours = model.state_dict()
    stored = {}
    for name in names:
        renamed = rename_source_key(name, renamings, [], model.base_model_prefix, ours)[0]
        # Some renamings also fit names that are already right.
        stored[name if name in ours and renamed not in ours else renamed] = name
    return stored


def parts_on_disk(model: Any) -> dict[str, list[str]]:
    """Return the parameters that transformers concatenates of several tensors, with these.

    The tensors are of equal size, along the first dimension, and have names as in memory. Routed
    experts are left out.

    Args:
        model: Of transformers.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Concatenate, WeightConverter

    parts = {}
    for transform in get_model_conversion_mapping(model, add_legacy=False):
        if not isinstance(transform, WeightConverter):
            continue
        if [type(operation) for operation in transform.operations] != [Concatenate]:
            continue
        (whole,), ends = transform.target_patterns, transform.reverse_transform().target_patterns
        for name in model.state_dict():
            if name.endswith(whole):
                parts[name] = [name.removesuffix(whole) + end for end in ends]
    return parts


def names_on_disk(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return what transformers calls parameters in the files that it saves, by their names.

    Args:
        model: Of transformers.
        names: Of parameters outside the routed experts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    return saved_names(names, get_model_conversion_mapping(model, add_legacy=False))
