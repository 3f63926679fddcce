"""Runs real vLLM with the plugin on a GPU: its answers, then its speed against int4 and bfloat16.

All engines run one after another in one process, because importing vLLM takes most of a minute.
`eager` and `graphs` compare what a small packed checkpoint answers with transformers in float32,
without and with CUDA graphs. `moeq`, `gptq` and `bf16` are layers of Mixtral-8x7B's shape with
dummy weights, of 2.5 bits, 4 bits in vLLM's Marlin kernel, and 16. Results are written after each.
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # engines in this process
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from results import RESULTS, table, write_section
from safetensors.torch import load_file, save_file

from moeq.api import quantize
from moeq.bench import SHAPES, Shape
from vllm_moeq.format import BitPlan, LayerBits, dequantize

ANSWERS, RATES = ("graphs", "eager"), ("moeq", "gptq", "bf16")
JOBS = ("graphs", *RATES, "eager")
BITS, GROUP_SIZE = (3, 2), 128
LAYERS = 16
"""As many as fit 80 GB in bfloat16 with room for the cache."""
REQUESTS = (1, 16, 64, 256)
PREFILLS = ((1, 512), (8, 1024))
"""Requests, and tokens of each."""
SHORT, LONG, DECODE_PROMPT = 8, 72, 16
"""Tokens that are generated: what the long run takes more than the short one is decoding alone."""
RUNS = 3
SMALL_BITS, SMALL_LAYERS = (3, 2, 4, 8, 1, 3, 2, 4), 2
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 64, 16
LARGEST_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1}
"""Of a prompt's mean negative log-likelihood. Rounding to bfloat16 sends some tokens to other
experts; wrong weights or a wrong expert change it by more than 1."""
VOCABULARY = 320


@dataclass(slots=True)
class Found:
    """What was found so far.

    Attributes:
        answers: Cells of a row, by job.
        rates: Tokens per second by column, by job.
        failures: Why a job has no result, or a wrong one.
    """

    answers: dict[str, list[str]] = field(default_factory=dict)
    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def engine(model: Path, **options: Any) -> Any:
    """Start an engine."""
    from vllm import LLM

    if torch.cuda.is_available():
        options["attention_backend"] = "TRITON_ATTN"  # FlashAttention is not in the bundle
    start = time.monotonic()
    llm = LLM(str(model), disable_log_stats=True, enable_prefix_caching=False, **options)
    print(f"engine ready in {time.monotonic() - start:.0f} s", flush=True)
    return llm


def stop(llm: Any) -> None:
    """End an engine, and give its memory back for the next."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def plan(bits: Sequence[int], layers: int) -> BitPlan:
    """Give the experts of every layer of a Mixtral these widths."""
    widths = LayerBits(tuple(bits), tuple(bits))
    names = (f"model.layers.{layer}.block_sparse_moe.experts" for layer in range(layers))
    return BitPlan(GROUP_SIZE, dict.fromkeys(names, widths))


def write_small_model(folder: Path) -> None:
    """Write a Mixtral of random weights, large enough for answers that differ clearly."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=256,
        num_hidden_layers=SMALL_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, num_experts_per_tok=2,
        num_local_experts=len(SMALL_BITS),
        max_position_embeddings=512, initializer_range=0.1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)


def write_unpacked(packed: Path, folder: Path) -> None:
    """Write a packed checkpoint as one of float32 that transformers reads."""
    config = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    group_size = config.pop("quantization_config")["group_size"]
    stored: dict[str, torch.Tensor] = {}
    for file in packed.glob("*.safetensors"):
        stored |= load_file(file)
    tensors = {}
    for name, tensor in stored.items():
        stem, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            scale = stored[f"{stem}.weight_scale"]
            bits = tensor.shape[1] * 8 // (scale.shape[1] * group_size)
            zero_point = stored[f"{stem}.weight_zero_point"]
            tensors[f"{stem}.weight"] = dequantize(tensor, scale, zero_point, bits, group_size)
        elif kind not in ("weight_scale", "weight_zero_point"):
            tensors[name] = tensor.float()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Expected:
    """A packed checkpoint and what transformers answers in float32.

    Attributes:
        packed: Its folder.
        prompts: Token ids.
        likelihoods: Mean negative log-likelihood of each prompt.
        answers: Greedy continuation of each.
    """

    packed: Path
    prompts: list[list[int]]
    likelihoods: list[float]
    answers: list[list[int]]

    @classmethod
    @torch.no_grad()
    def make(cls, folder: Path) -> "Expected":
        """Write the checkpoint, with experts of all widths, and run it."""
        from transformers import AutoModelForCausalLM

        write_small_model(folder / "model")
        quantize(
            folder / "model", folder / "packed", plan=plan(SMALL_BITS, SMALL_LAYERS),
            method="rtn",
        )  # fmt: skip
        write_unpacked(folder / "packed", folder / "unpacked")
        model = AutoModelForCausalLM.from_pretrained(folder / "unpacked", dtype=torch.float32)
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, VOCABULARY, (PROMPTS, PROMPT_TOKENS), generator=generator)
        logits = model.eval()(prompts).logits.log_softmax(-1)
        chosen = logits[:, :-1].gather(-1, prompts[:, 1:, None])
        answers = model.generate(
            prompts, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip
        return cls(
            folder / "packed",
            prompts.tolist(),
            (-chosen.mean((1, 2))).tolist(),
            answers[:, PROMPT_TOKENS:].tolist(),
        )


def compare_answers(expected: Expected, graphs: bool, found: Found, name: str) -> None:
    """Compare an engine's answers with those of transformers."""
    from vllm import SamplingParams

    dtype = "float32"
    options: dict[str, Any] = {}
    if torch.cuda.is_available():
        dtype, options = "bfloat16", {"gpu_memory_utilization": 0.2}
    if graphs:
        options["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4, 8]}
    llm = engine(
        expected.packed, dtype=dtype, max_model_len=256, max_num_seqs=PROMPTS,
        skip_tokenizer_init=True, enforce_eager=not graphs, **options,
    )  # fmt: skip
    try:
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in expected.prompts],
            SamplingParams(
                temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=0,
                detokenize=False,
            ),
            use_tqdm=False,
        )  # fmt: skip
    finally:
        stop(llm)
    likelihoods = [
        -sum(o.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))) / (len(ids) - 1)
        for o, ids in zip(outputs, expected.prompts, strict=True)
    ]
    difference = max(abs(a - b) for a, b in zip(likelihoods, expected.likelihoods, strict=True))
    equal = sum(
        a == b
        for output, answer in zip(outputs, expected.answers, strict=True)
        for a, b in zip(output.outputs[0].token_ids, answer, strict=True)
    )
    found.answers[name] = [
        dtype,
        f"{sum(likelihoods) / PROMPTS:.4f}",
        f"{sum(expected.likelihoods) / PROMPTS:.4f}",
        f"{difference:.5f}",
        f"{equal} of {PROMPTS * NEW_TOKENS}",
    ]
    if not difference <= LARGEST_DIFFERENCE[dtype]:
        found.failures[name] = f"differs by {difference:.3g}, more than rounding does"


def write_dummy(folder: Path, kind: str, shape: Shape, layers: int) -> None:
    """Write the config.json of a Mixtral whose weights vLLM makes up."""
    from transformers import MixtralConfig

    heads = max(1, shape.hidden_size // 128)
    config = MixtralConfig(
        architectures=["MixtralForCausalLM"], vocab_size=32000, hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 4),
        num_local_experts=shape.experts, num_experts_per_tok=shape.top_k,
        max_position_embeddings=32768, sliding_window=None, dtype="bfloat16",
    )  # fmt: skip
    bits = [BITS[expert % len(BITS)] for expert in range(shape.experts)]
    quantization = {
        "moeq": {"quant_method": "moeq", **plan(bits, layers).to_dict()},
        "gptq": {
            "quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE, "desc_act": False,
            "sym": True, "lm_head": False,
            "modules_in_block_to_quantize": ["block_sparse_moe.experts"],
        },
    }  # fmt: skip
    if kind in quantization:
        config.quantization_config = quantization[kind]
    config.save_pretrained(folder)


def measure_rates(
    kind: str, shape: Shape, layers: int, requests: Sequence[int], found: Found
) -> None:
    """Measure tokens per second of decoding and of prefill."""
    from vllm import SamplingParams

    options: dict[str, Any] = {"enforce_eager": True}
    if torch.cuda.is_available():
        options = {
            "gpu_memory_utilization": 0.85,
            "compilation_config": {
                "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": list(requests),
            },
        }  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        write_dummy(Path(work), kind, shape, layers)
        llm = engine(
            Path(work), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
            max_model_len=2048, max_num_seqs=max(requests), max_num_batched_tokens=8192, **options,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def seconds(count: int, prompt: int, new: int) -> float:
        prompts = torch.randint(3, 31000, (count, prompt), generator=generator).tolist()
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        start = time.monotonic()
        llm.generate(inputs, sampling, use_tqdm=False)
        return time.monotonic() - start

    rates: dict[str, float] = {}
    try:
        for count in requests:
            seconds(count, DECODE_PROMPT, SHORT)  # compiles
            times = [
                seconds(count, DECODE_PROMPT, LONG) - seconds(count, DECODE_PROMPT, SHORT)
                for _ in range(RUNS)
            ]
            rates[f"decode, {count}"] = count * (LONG - SHORT) / median(times)
            found.rates[kind] = rates
        for count, length in PREFILLS:
            seconds(count, length, 1)
            times = [seconds(count, length, 1) for _ in range(RUNS)]
            rates[f"prefill, {count} × {length}"] = count * length / median(times)
    finally:
        stop(llm)


def write_answers(found: Found, path: Path) -> None:
    """Write the section of the answers."""
    parts = [
        "Real vLLM with the plugin: a Mixtral of random weights with experts of 1 to 8 bits, "
        f"{PROMPTS} prompts of {PROMPT_TOKENS} tokens; mean negative log-likelihood of the "
        "prompts, and greedy tokens, against transformers in float32 on the same packed weights.",
        table(
            ["engine", "type", "NLL", "float32", "largest difference", "equal tokens"],
            [
                [name, *found.answers.get(name, [f"not measured: {reason}", "", "", "", ""])]
                for name in ANSWERS
                if (reason := found.failures.get(name, "the time was over"))
            ],
        ),
    ]
    _write(found, path, "answers", parts, ANSWERS)


def write_rates(found: Found, shape: Shape, layers: int, path: Path) -> None:
    """Write the section of the tokens per second."""
    parts = [
        f"Real vLLM with the plugin: {layers} layers of hidden size {shape.hidden_size}, "
        f"intermediate size {shape.intermediate_size}, {shape.experts} experts, {shape.top_k} per "
        f"token, dummy weights. moeq: {'/'.join(map(str, BITS))} bits; gptq: 4 bits, experts only. "
        f"Decoding: what {LONG} tokens take more than {SHORT}, at so many requests; median of "
        f"{RUNS} runs. In brackets: over bf16, or the first that was measured."
    ]
    columns = list(dict.fromkeys(column for rates in found.rates.values() for column in rates))
    base = found.rates.get("bf16") or next(iter(found.rates.values()), {})
    rows = []
    for name in RATES:
        rates = found.rates.get(name, {})
        cells = []
        for column in columns:
            cell = "not measured"
            if column in rates:
                cell = f"{rates[column]:.0f}"
                if column in base:
                    cell += f" ({rates[column] / base[column]:.2f}×)"
            cells.append(cell)
        rows.append([name, *cells])
    if columns:
        parts.append(table(["tokens/s", *columns], rows))
    _write(found, path, "speed", parts, RATES)


def _write(found: Found, path: Path, what: str, parts: list[str], jobs: Sequence[str]) -> None:
    failures = [f"{job} failed: {found.failures[job]}" for job in jobs if job in found.failures]
    write_section(
        path,
        "Speed on a GPU",
        f"vLLM on a GPU: {what}",
        parts + failures,
        packages=("torch", "triton", "vllm-moeq", "vllm", "transformers"),
    )


def main() -> None:
    """Run the jobs; exit with status 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--shape", default="mixtral", help="as in moeq bench (default mixtral)")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"default {LAYERS}")
    parser.add_argument("--requests", nargs="+", type=int, default=REQUESTS)
    parser.add_argument("--seconds", type=float, default=200, help="no job starts after (200)")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    shape = SHAPES.get(options.shape) or Shape.parse(options.shape)
    deadline = time.monotonic() + options.seconds
    found = Found()
    with tempfile.TemporaryDirectory() as work:
        expected = Expected.make(Path(work)) if set(options.jobs) & set(ANSWERS) else None
        for name in options.jobs:
            if time.monotonic() > deadline:
                found.failures[name] = "the time was over"
                continue
            print(f"-- {name}", flush=True)
            try:
                if name in ANSWERS:
                    assert expected is not None
                    compare_answers(expected, name == "graphs", found, name)
                else:
                    measure_rates(name, shape, options.layers, options.requests, found)
            except Exception as error:  # the next engine may do better
                text = " ".join(str(error).split())
                found.failures[name] = f"{type(error).__name__}: {text[:300]}"
            if name in ANSWERS:
                write_answers(found, options.results)
            else:
                write_rates(found, shape, options.layers, options.results)
    for name, reason in found.failures.items():
        print(f"gpu_e2e.py: {name}: {reason}", file=sys.stderr)
    sys.exit(bool(found.failures))


if __name__ == "__main__":
    main()
