"""What transformers says of a Mixture-of-Experts model that has no row in the table of families.

It knows what the tensors of its models are called on disk (``conversion_mapping``), and how fused
experts lie in memory (``use_experts_implementation``). It does not say which norm is in front of
experts, nor what a layer does with their sum: a derived row takes nothing for granted there.
"""

import json
import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from packaging.version import Version

from moeq.checkpoint.families import Family
from moeq.checkpoint.meta import OLDEST, meta_model, saved_names
from moeq.errors import MoeqError

logger = logging.getLogger(__name__)

_FUSED_DOWN = re.compile(r"(?P<layer>.*\blayers\.\d+\.)(?P<path>(?:.*\.)?experts)\.down_proj")
_OF_ONE_EXPERT = re.compile(r"(?:.*\.)?experts\.\*\.(?P<matrix>\w+)\.weight\$?")
"""Matches the names of which transformers makes a fused tensor, a star for each expert's number."""
_TOGETHER, _TURNED = {"MergeModulelist", "Concatenate"}, {"Transpose"}
"""What transformers may do to experts that are on disk as we read them: one by one, and fused."""
_MOST_LAYERS = 4096
"""Of a model whose tensors have not been counted."""


class _Experts(NamedTuple):
    """Fused experts of one layer in a model of transformers.

    Attributes:
        layer: Path of the layer, with a dot at its end.
        path: Of their module inside the layer.
        module: As ``use_experts_implementation`` has made it.
    """

    layer: str
    path: str
    module: Any


@lru_cache(maxsize=8)
def derived_family(config: str) -> Family | None:
    """Return a row for a model as transformers describes it, and warn that no test holds it.

    Args:
        config: ``config.json`` as text.

    Returns:
        None if transformers does not know the model, or does not describe its experts: their class
        is none that it fuses, or has a gate of its own, or no weight is seen to be their router.

    Raises:
        MoeqError: ``config.json`` describes no model, or transformers is too old to ask it.
    """
    from transformers import CONFIG_MAPPING, __version__  # takes seconds to import

    stated = json.loads(config)
    model_type = stated.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    if Version(__version__) < OLDEST:
        raise MoeqError(f"transformers {OLDEST} might describe it; this is {__version__}")
    model = meta_model(stated, "config.json", _MOST_LAYERS)
    experts = _experts(model)
    router = None if experts is None else _router(model, experts)
    if experts is None or router is None:
        return None
    family = _row(model_type, model, experts, router)
    if family is not None:
        logger.warning(
            "model_type %r is not among the tested families: what its tensors are called is taken "
            "from transformers %s, and whether vLLM runs it is not known. Compare the packed "
            "checkpoint with `moeq eval`, also with `--backend vllm`",
            model_type,
            __version__,
        )
    return family


def _experts(model: Any) -> _Experts | None:
    """Return the first experts of a model, if transformers says how they lie."""
    for name, _ in model.named_parameters():
        match = _FUSED_DOWN.fullmatch(name)
        if match is None:
            continue
        module = model.get_submodule(match["layer"] + match["path"])
        gate = getattr(type(module), "_apply_gate", None)
        if gate is None or gate.__module__ == type(module).__module__:
            return None
        return _Experts(match["layer"], match["path"], module)
    return None


def _router(model: Any, experts: _Experts) -> str | None:
    """Return the name in its layer of the one matrix beside the experts with a row for each."""
    beside = experts.layer + experts.path.rpartition("experts")[0]
    shape = (len(experts.module.down_proj), model.config.get_text_config().hidden_size)
    candidates = [
        name.removeprefix(experts.layer)
        for name, parameter in model.named_parameters()
        # Shared experts may be as wide as there are others.
        if name.startswith(beside) and name.endswith(".weight") and ".shared" not in name
        if parameter.shape == shape
    ]
    return candidates[0] if len(candidates) == 1 else None


def _row(model_type: str, model: Any, experts: _Experts, router: str) -> Family | None:
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(model, add_legacy=False)
    has_gate = experts.module.has_gate
    first = "gate_up_proj" if has_gate else "up_proj"
    usual = ["gate_proj", "up_proj", "down_proj"] if has_gate else ["up_proj", "down_proj"]
    one_by_one: list[str] = []
    for target in (first, "down_proj"):
        names = _of_one_expert(transforms, target)
        if names is None:
            return None
        one_by_one += names
    if len(one_by_one) not in (0, len(usual)):
        return None
    *gate, up, down = one_by_one or usual
    container, *fused = (f"{experts.path}.{name}" for name in ("", first, "down_proj"))
    in_memory = [container, router, *fused]
    on_disk = saved_names((experts.layer + name for name in in_memory), transforms).values()
    saved = [re.split(r"\blayers\.\d+\.", name)[-1] for name in on_disk]
    canonical = [*saved[:2], *(saved[0] + name.removeprefix(container) for name in fused)]
    other = [*in_memory[:2], *saved[2:]]
    return Family(
        (model_type,),
        experts=canonical[0].removesuffix("."),
        router=canonical[1],
        gate=gate[0] if has_gate else None,
        up=up,
        down=down,
        aliases=tuple((old, new) for old, new in zip(other, canonical, strict=True) if old != new),
        biased=experts.module.has_bias,
        interleaved=not experts.module.is_concatenated,
        norm="",
        normalized=True,
        derived=True,
    )


def _of_one_expert(transforms: Sequence[Any], target: str) -> list[str] | None:
    """Return what the matrices of an expert are called, of which a fused tensor is made.

    There are none where it is fused on disk as well. The result is None if transformers does more
    to them than we do.
    """
    for transform in transforms:
        if not transform.target_patterns[0].endswith(f"experts.{target}"):
            continue
        matches = [_OF_ONE_EXPERT.fullmatch(s.replace("\\", "")) for s in transform.source_patterns]
        names = [match["matrix"] for match in matches if match is not None]
        done = {type(operation).__name__ for operation in getattr(transform, "operations", ())}
        if not done <= (_TOGETHER if names else _TURNED):
            return None
        if names:
            return names
    return []
