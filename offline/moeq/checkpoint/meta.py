"""The model that transformers builds of a ``config.json``, without memory for its tensors."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from packaging.version import Version

from moeq.errors import MoeqError

OLDEST = Version("5.15")
"""Of transformers: releases before build some models in another way than they are on disk."""
_COUNTS = re.compile(r"(^|_)(layers|experts|depth|blocks)$|^num_(layers|experts|blocks)")
"""Matches names in ``config.json`` of what a model has several of, each with tensors of its own."""
_NOT_MANY = 1000
"""Layers or experts that are built in no time, whatever the tensors are."""


def meta_model(config: Mapping[str, Any], where: str, tensors: int = 0) -> Any:
    """Return a model on the meta device; no code of the checkpoint is run.

    Args:
        config: ``config.json``, with a ``model_type`` that transformers knows.
        where: Its path, for messages.
        tensors: In the checkpoint.

    Raises:
        MoeqError: It describes no model, or one with more layers or experts than tensors.
    """
    import torch
    from transformers import CONFIG_MAPPING, __version__  # takes seconds to import

    _check_counts(config, where, tensors)
    with _silent_transformers(), torch.device("meta"):
        try:
            known = CONFIG_MAPPING[config["model_type"]].from_dict(_with_infinities(config))
            return auto_class(known).from_config(without_code(known), trust_remote_code=False)
        except Exception as error:  # whatever a wrong value leads to inside transformers
            raise MoeqError(
                f"{where} describes no model that transformers {__version__} can build; correct "
                f"it, or update transformers ({type(error).__name__}: {error})"
            ) from error


def _with_infinities(value: Any) -> Any:
    """Return what is in a file of transformers, which writes {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_infinities(inner) for key, inner in value.items()}
    return [_with_infinities(inner) for inner in value] if isinstance(value, list) else value


def without_code(config: Any) -> Any:
    """Return a configuration of transformers that names no kernels.

    ``config.json`` may, and transformers would load them from the hub: they are code.
    """
    config._attn_implementation = config._experts_implementation = None
    return config


def auto_class(config: Any) -> Any:
    """Return what loads a model with all its parts, given its configuration in transformers."""
    # Takes seconds to import, which other commands should not wait for.
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
    )

    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    return (
        AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText
    )


def saved_names(names: Iterable[str], transforms: Sequence[Any]) -> dict[str, str]:
    """Return what transformers calls parameters in the files that it saves, by their names.

    Args:
        names: Of parameters, or the starts of several.
        transforms: ``get_model_conversion_mapping`` of the model.
    """
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [
        transform.reverse_transform()
        for transform in reversed(transforms)
        # Other classes of renamings say what may be on disk, not what is saved.
        if type(transform) is WeightRenaming
    ]
    return {name: rename_source_key(name, renamings, [])[0] for name in names}


def _check_counts(config: Mapping[str, Any], where: str, tensors: int) -> None:
    """Refuse numbers of layers or experts that the tensors cannot be of; they would be built."""
    most = max(_NOT_MANY, tensors)
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_counts(value, where, tensors)
        elif _COUNTS.search(key) and isinstance(value, int) and value > most:
            raise MoeqError(
                f"{where} has {key} {value}, more than there are tensors for: correct it, or get "
                "the checkpoint again"
            )


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Leave out advice on how to run a model, which is not run here."""
    from transformers.utils import logging as messages

    verbosity = messages.get_verbosity()
    messages.set_verbosity_error()
    try:
        yield
    finally:
        messages.set_verbosity(verbosity)
