"""The README.md of a packed checkpoint."""

import warnings
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from moeq.checkpoint.wording import linear_summary
from vllm_moeq.format import WIDTHS, BitPlan

SOURCE_PRECISION = "source_precision"
"""What a plan's provenance calls the precision of its source, and what became of it."""
_TEXT = """\
# {title}

Expert weights of {source} quantized by vllm-moeq: every expert has its own bit-width,
{achieved:.3f} bits on average ({bits_per_weight:.3f} bits per weight with scales and zero points).
{others}

| | |
|---|---|
| strategy | {strategy} |
| bits asked for / achieved | {requested} / {achieved:.4f} |
| bits per expert weight, all included | {bits_per_weight:.4f} |
| group size | {group_size} |
| rounding | {rounding} |
| source | {precision} |
| packed experts | {expert_bytes:,} bytes |
| dense layers | {dense} |
| all tensors | {total_bytes:,} bytes |
{quality}
## Plan

Experts of each layer at each width, gate and up / down:

{plan}

## Use

{vllm}With transformers and vllm-moeq:

```
import vllm_moeq.hf  # before from_pretrained
model = {auto_class}.from_pretrained("PATH_OF_THIS_FOLDER", device_map="auto")
```

`moeq verify PATH_OF_THIS_FOLDER` checks that every file is complete and undamaged;
`moeq inspect PATH_OF_THIS_FOLDER --html FILE` shows every expert.
"""
_VLLM = """\
With vLLM and vllm-moeq installed:

```
vllm serve PATH_OF_THIS_FOLDER --quantization moeq
```

"""
_NO_VLLM = "vLLM does not have this kind of model.\n\n"
_QUALITY = """
## Quality

On {tokens:,} tokens held back from the calibration text, this plan (before layers made up for each
other) was {divergence:.5f} nats per token away from the 16-bit model (Kullback-Leibler divergence),
its loss {loss:+.5f} nats per token. {others} other plans of the same size were tried; the best of
them had {second:.5f}. Judge it on your own text:
`moeq eval PATH_OF_THIS_FOLDER --against BASE_MODEL --text TEXT`.
"""


def write_model_card(folder: Path, plan: BitPlan, source: str, encodes: bool = False) -> None:
    """Replace ``README.md`` in ``folder``, keeping what the source card says about licence etc.

    Args:
        folder: Of the packed checkpoint.
        plan: Its widths.
        source: Folder or hub id of the model that it comes from.
        encodes: Whether that has an encoder, and vLLM does not run it.
    """
    path = folder / "README.md"
    data = _source_data(path)
    data.library_name = "transformers" if encodes else "vllm"
    data.tags = sorted({*(data.tags or []), "moe", "moeq", "quantized"})
    name = link = Path(source).resolve().name
    # What a fine-tuned model comes from is not what this one comes from.
    data.base_model = data.base_model_relation = None
    if not Path(source).exists():
        data.base_model, data.base_model_relation = source, "quantized"
        link = f"[{source}](https://huggingface.co/{source})"
    provenance = plan.provenance
    text = _TEXT.format(
        title=f"{name}, mixed expert bits",
        source=link,
        strategy=provenance.strategy,
        requested="unknown"
        if provenance.requested_bits is None
        else f"{provenance.requested_bits:.4g}",
        achieved=provenance.achieved_bits or float("nan"),
        bits_per_weight=provenance.bits_per_weight or float("nan"),
        group_size=plan.group_size,
        rounding=provenance.details.get("rounding", "unknown"),
        expert_bytes=provenance.expert_bytes or 0,
        total_bytes=provenance.total_bytes or 0,
        dense=linear_summary(plan),
        precision=provenance.details.get(SOURCE_PRECISION, "16 or 32 bits"),
        others=_others(plan),
        quality=_quality(plan),
        vllm=_NO_VLLM if encodes else _VLLM,
        auto_class="AutoModelForSeq2SeqLM" if encodes else "AutoModelForCausalLM",
        plan=_plan(plan),
    )
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", encoding="utf-8")


def _others(plan: BitPlan) -> str:
    """Say which tensors besides experts are quantized, and which are not."""
    if not plan.linear_bits:
        return "Routers, attention, norms and embeddings are not quantized."
    quantized = ["attention", "shared experts", "dense MLPs"]
    kept = ["routers", "norms"]
    names = {name.rpartition(".")[2] for name in plan.linear_bits}
    for name, words in (("embed_tokens", "token embeddings"), ("lm_head", "the output head")):
        (quantized if name in names else kept).append(words)
    return (
        f"{_listed(quantized)} have 4, 8 or 16 bits, in the format of\ncompressed-tensors. "
        f"{_listed(kept)} are not quantized."
    )


def _listed(words: list[str]) -> str:
    text = f"{', '.join(words[:-1])} and {words[-1]}"
    return text[0].upper() + text[1:]


def _quality(plan: BitPlan) -> str:
    tried = plan.provenance.details.get("tried", [])
    if len(tried) < 2:
        return ""
    best, second = tried[:2]
    return _QUALITY.format(
        tokens=best["tokens"],
        divergence=best["divergence"],
        loss=best["loss_increase"],
        others=len(tried) - 1,
        second=second["divergence"],
    )


def _plan(plan: BitPlan) -> str:
    used = [
        width
        for width in WIDTHS
        if any(width in (*bits.w13, *bits.w2) for bits in plan.expert_bits.values())
    ]
    lines = [
        "| layer | " + " | ".join(f"{width} bit" for width in used) + " |",
        "|---|" + "---:|" * len(used),
    ]
    for container, bits in plan.expert_bits.items():
        cells = (f"{bits.w13.count(width)} / {bits.w2.count(width)}" for width in used)
        lines.append(f"| `{container}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
