"""The engine process behind ``support.engine``: one JSON job in, one JSON line out."""

import json
import sys
from typing import Any

import torch
from vllm import LLM, SamplingParams

from support.engine import NEW_TOKENS, PROMPTS, RESULT_MARK


def _buffer_sizes(model: torch.nn.Module) -> dict[str, int]:
    return {
        name: parameter.numel() * parameter.itemsize
        for name, parameter in model.named_parameters()
        if ".routed_experts." in name
    }


def _set_layout(model: torch.nn.Module, row: int, column: int, value: int) -> int:
    """Change one entry of the first MoE layer's layout; return what it was."""
    layer = next(module for module in model.modules() if hasattr(module, "moeq_layout"))
    before = int(layer.moeq_layout[row, column])
    layer.moeq_layout[row, column] = value
    return before


def _generate(llm: LLM) -> list[dict[str, Any]]:
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in PROMPTS],
        SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=0, logprobs=0
        ),
        use_tqdm=False,
    )
    completions = []
    for output in outputs:
        chosen = output.outputs[0]
        prompt = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        generated = zip(chosen.token_ids, chosen.logprobs, strict=True)
        completions.append(
            {
                "tokens": list(chosen.token_ids),
                "prompt_logprobs": [values[token].logprob for token, values in prompt],
                "logprobs": [values[token].logprob for token, values in generated],
            }
        )
    return completions


def main() -> None:
    """Generate; then once more for each corruption (row, column, value) of the expert layout."""
    job = json.loads(sys.argv[1])
    llm = LLM(model=job["model"], **job["llm"])
    buffers = llm.apply_model(_buffer_sizes)
    completions = [_generate(llm)]
    for row, column, value in job["corruptions"]:
        before = llm.apply_model(
            lambda model, r=row, c=column, v=value: _set_layout(model, r, c, v)
        )
        completions.append(_generate(llm))
        llm.apply_model(lambda model, r=row, c=column, v=before[0]: _set_layout(model, r, c, v))
    print()
    print(RESULT_MARK + json.dumps({"completions": completions, "buffers": buffers}), flush=True)


if __name__ == "__main__":
    main()
