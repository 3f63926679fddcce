"""The README.md of a packed checkpoint."""

import warnings
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from vllm_moeq.format import BitPlan

_TEXT = """\
# {title}

Expert weights of {source} quantized by vllm-moeq: every expert has its own bit-width,
{achieved:.3f} bits on average ({bits_per_weight:.3f} bits per weight with scales and zero points).
Routers, attention, norms and embeddings are untouched.

| | |
|---|---|
| strategy | {strategy} |
| bits asked for / achieved | {requested} / {achieved:.4f} |
| bits per expert weight, all included | {bits_per_weight:.4f} |
| group size | {group_size} |
| packed experts | {expert_bytes:,} bytes |
| all tensors | {total_bytes:,} bytes |

## Use

With vLLM and vllm-moeq installed:

```
vllm serve PATH_OF_THIS_FOLDER --quantization moeq
```

Do not load this checkpoint with plain `transformers`: it does not know the packed tensors, warns,
and goes on with RANDOM experts.

`moeq verify PATH_OF_THIS_FOLDER` checks that every file is complete and undamaged.
"""


def write_model_card(folder: Path, plan: BitPlan, source: str) -> None:
    """Replace ``README.md`` in ``folder``, keeping what the source card says about licence etc."""
    path = folder / "README.md"
    data = _source_data(path)
    data.library_name = "vllm"
    data.tags = sorted({*(data.tags or []), "moe", "moeq", "quantized"})
    name = link = Path(source).resolve().name
    if not Path(source).exists():
        data.base_model = source
        link = f"[{source}](https://huggingface.co/{source})"
    provenance = plan.provenance
    text = _TEXT.format(
        title=f"{name}, mixed expert bits",
        source=link,
        strategy=provenance.strategy,
        requested=provenance.requested_bits,
        achieved=provenance.achieved_bits or float("nan"),
        bits_per_weight=provenance.bits_per_weight or float("nan"),
        group_size=plan.group_size,
        expert_bytes=provenance.expert_bytes or 0,
        total_bytes=provenance.total_bytes or 0,
    )
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", encoding="utf-8")


def _source_data(path: Path) -> ModelCardData:
    if not path.is_file():
        return ModelCardData()
    try:
        return ModelCard.load(path).data
    except Exception as error:  # What a stranger wrote there must not cost a conversion.
        warnings.warn(
            f"the header of {path.name} is unreadable and left out: {error}", stacklevel=2
        )
        return ModelCardData()
