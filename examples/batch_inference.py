"""Complete many prompts at once, without a server.

    python examples/batch_inference.py MODEL PROMPTS.txt COMPLETIONS.jsonl

MODEL is a packed checkpoint (or any model that vLLM runs); PROMPTS.txt has one prompt on each line.
vLLM batches them by itself, which uses the machine far better than one request after the other.
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    """Generate, and write one JSON object for each prompt, in order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="packed checkpoint")
    parser.add_argument("prompts", type=Path, help="text file, one prompt on each line")
    parser.add_argument("output", type=Path, help="JSON lines file to write")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each completion")
    parser.add_argument("--max-model-len", type=int, default=2048, help="prompt and completion")
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args()

    from vllm import LLM, SamplingParams

    prompts = [line for line in options.prompts.read_text(encoding="utf-8").splitlines() if line]
    llm = LLM(model=options.model, max_model_len=options.max_model_len)
    sampling = SamplingParams(temperature=options.temperature, max_tokens=options.max_tokens)
    outputs = llm.generate(prompts, sampling)
    llm.llm_engine.engine_core.shutdown()  # at the end of the process it could abort
    with options.output.open("w", encoding="utf-8") as file:
        for prompt, output in zip(prompts, outputs, strict=True):
            entry = {"prompt": prompt, "completion": output.outputs[0].text}
            file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
