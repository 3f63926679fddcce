"""Vision models with experts: an image and text, in vLLM and in transformers.

vLLM's classes of them need a torchvision that fits torch, which CI does not have.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from support.engine import (
    NEW_TOKENS,
    Completion,
    Logits,
    assert_likely,
    assert_same,
    generate,
    in_fork,
)
from support.linear import pack_linear
from support.models import BFLOAT16_IN_VLLM, load_model
from support.packed import pack_mixed
from support.reference import dequantize_checkpoint

pytest.importorskip("torchvision")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPT = "see <|vision_start|><|image_pad|><|vision_end|> say"
PROMPT_OF_GEMMA = "see <|image|> say"
SPECIAL = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
FIRST_SPECIAL = 300
TOKENS_OF_GEMMA = ["image", "boi", "eoi", "video", "audio", "boa", "eoa"]
SECTIONS = {"qwen3_vl_moe": [6, 5, 5], "qwen3_5_moe": [2, 1, 1]}
"""Which part of the rotary frequencies stands for time, height and width."""


def _image() -> Image.Image:
    return Image.linear_gradient("L").resize((64, 64)).convert("RGB")


def _with_processor(source: Path, model: Path, sections: list[int]) -> None:
    """Copy a model with what makes an image and a prompt its inputs."""
    from transformers import AutoTokenizer

    shutil.copytree(source, model)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["rope_parameters"] |= {
        "mrope_section": sections,
        "mrope_interleaved": True,
    }
    (model / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(len(tokenizer), FIRST_SPECIAL)])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.save_pretrained(model)
    sizes = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"shortest_edge": 4096, "longest_edge": 4096},
        "processor_class": "Qwen3VLProcessor",
    }
    for name, kind in (
        ("preprocessor_config", {"image_processor_type": "Qwen2VLImageProcessorFast"}),
        ("video_preprocessor_config", {"video_processor_type": "Qwen3VLVideoProcessor"}),
    ):
        (model / f"{name}.json").write_text(json.dumps(sizes | kind))


def _with_processor_of_gemma(source: Path, model: Path) -> None:
    from transformers import (
        AutoTokenizer,
        Gemma4AudioFeatureExtractor,
        Gemma4ImageProcessor,
        Gemma4Processor,
        Gemma4VideoProcessor,
    )

    shutil.copytree(source, model)
    special = {f"{name}_token": f"<|{name}|>" for name in TOKENS_OF_GEMMA}
    tokenizer = AutoTokenizer.from_pretrained(model, extra_special_tokens=special)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(len(tokenizer), FIRST_SPECIAL)])
    Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessor(max_soft_tokens=70),
        tokenizer,
        Gemma4VideoProcessor(),
    ).save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    for name, token in special.items():
        config[f"{name}_id"] = tokenizer.convert_tokens_to_ids(token)
    config["vision_config"]["default_output_length"] = 70  # as released, but for the number
    (model / "config.json").write_text(json.dumps(config))


def _engine_job(model: str, prompt: str, dtype: str, result: str) -> None:
    from vllm import LLM, SamplingParams

    from support.engine_main import fields_of

    llm = LLM(
        model=model,
        dtype=dtype,
        max_model_len=128,
        max_num_seqs=2,
        enforce_eager=True,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 1, "video": 0},
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    request = {"prompt": prompt, "multi_modal_data": {"image": _image()}}
    (output,) = llm.generate([request], sampling, use_tqdm=False)
    Path(result).write_text(json.dumps(fields_of(output)))
    llm.llm_engine.engine_core.shutdown()


def _in_vllm(model: Path, prompt: str, dtype: str) -> Completion:
    result = model.parent / "result.json"
    process = in_fork(_engine_job, str(model), prompt, dtype, str(result))
    assert process.returncode == 0, process.log[-9000:]
    return Completion(**json.loads(result.read_text()))


def _in_transformers(model: Path, packed: Path, text: str) -> tuple[list[int], Logits]:
    """Return the ids of the prompt and its image, and what gives the logits of those and more."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(packed)
    inputs: dict[str, Any] = dict(processor(text=text, images=[_image()], return_tensors="pt"))
    network = load_model(model, attn_implementation="eager").eval()
    prompt = inputs.pop("input_ids")[0].tolist()
    kinds = inputs.pop("mm_token_type_ids")
    del inputs["attention_mask"]
    inputs.pop("num_soft_tokens_per_image", None)

    def logits(ids: list[int]) -> torch.Tensor:
        of_text = torch.zeros(1, len(ids) - len(prompt), dtype=kinds.dtype)
        more = inputs | {"mm_token_type_ids": torch.cat([kinds, of_text], 1)}
        with torch.no_grad():
            result: torch.Tensor = network(input_ids=torch.tensor([ids]), **more).logits[0]
        return result

    return prompt, logits


@pytest.mark.parametrize("family", [*SECTIONS, "gemma4"])
def test_an_image_and_text(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source, model = tiny_model(family), tmp_path / "model"
    if family in SECTIONS:
        text = PROMPT
        _with_processor(source, model, SECTIONS[family])
    else:
        text = PROMPT_OF_GEMMA
        _with_processor_of_gemma(source, model)
    packed = pack_linear(pack_mixed(model, tmp_path / "packed"))
    plain = dequantize_checkpoint(packed, tmp_path / "plain")
    prompt, logits = _in_transformers(plain, packed, text)

    found = _in_vllm(packed, text, "bfloat16" if family in BFLOAT16_IN_VLLM else "float32")

    if family in BFLOAT16_IN_VLLM:
        assert_likely([found], logits, [prompt])
    else:
        assert_same([found], generate(logits, [prompt]))
