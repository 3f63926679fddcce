"""Measures peak memory and time of `moeq quantize --calib` on a model of a given shape.

    python examples/benchmarks/calibration_cost.py --layers 8 --experts 8 --work FOLDER

The default is the layer of Mixtral-8x7B: 2.8 GB in bfloat16 with its 8 experts, made of random
weights in FOLDER, which needs the space of the model and twice that of the result. Rounding an
expert of this shape takes about 16 TFLOP, so all of it takes hours on a small CPU. Memory does not
depend on the number of layers; experts of this shape are rounded one at a time, small ones together
as far as that takes no more memory than the 16-bit weights of a layer.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from results import RESULTS, table, write_section
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MixtralConfig, PreTrainedTokenizerFast

from moeq.bench import GB
from moeq.calibration import STREAMS

BOUND = 3
"""Peak memory must stay below so many times a layer's bfloat16 weights, plus activations."""


def write_model(folder: Path, options: argparse.Namespace) -> int:
    """Write a random checkpoint, a file for each layer; return the bytes of a layer's experts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    hidden, inner, heads = (
        options.hidden_size,
        options.intermediate_size,
        options.hidden_size // 128,
    )
    config = MixtralConfig(
        architectures=["MixtralForCausalLM"],
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        num_local_experts=options.experts,
        num_experts_per_tok=2,
    )
    config.save_pretrained(folder)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).bfloat16()

    weight_map = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    experts_bytes = 0
    for index in range(options.layers):
        prefix = f"model.layers.{index}."
        kv = config.num_key_value_heads * 128
        tensors = {
            f"{prefix}self_attn.q_proj.weight": random(hidden, hidden),
            f"{prefix}self_attn.k_proj.weight": random(kv, hidden),
            f"{prefix}self_attn.v_proj.weight": random(kv, hidden),
            f"{prefix}self_attn.o_proj.weight": random(hidden, hidden),
            f"{prefix}input_layernorm.weight": torch.ones(hidden).bfloat16(),
            f"{prefix}post_attention_layernorm.weight": torch.ones(hidden).bfloat16(),
            f"{prefix}block_sparse_moe.gate.weight": random(options.experts, hidden),
        }
        for expert in range(options.experts):
            path = f"{prefix}block_sparse_moe.experts.{expert}."
            tensors[f"{path}w1.weight"] = random(inner, hidden)
            tensors[f"{path}w3.weight"] = random(inner, hidden)
            tensors[f"{path}w2.weight"] = random(hidden, inner)
        experts_bytes = sum(t.nbytes for name, t in tensors.items() if ".experts." in name)
        write(f"layer-{index}.safetensors", tensors)
    around = {
        "model.embed_tokens.weight": random(256, hidden),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
        "lm_head.weight": random(256, hidden),
    }
    write("around.safetensors", around)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return experts_bytes


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1, help="default 1")
    parser.add_argument("--experts", type=int, default=8, help="of each layer (default 8)")
    parser.add_argument("--hidden-size", type=int, default=4096, help="default 4096")
    parser.add_argument("--intermediate-size", type=int, default=14336, help="default 14336")
    parser.add_argument("--bits", default="2", help="as in moeq quantize (default 2)")
    parser.add_argument("--nsamples", type=int, default=32, help="default 32")
    parser.add_argument("--seqlen", type=int, default=512, help="default 512")
    parser.add_argument("--work", type=Path, help="folder for the model and the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        model, packed = Path(work) / "model", Path(work) / "packed"
        experts_bytes = write_model(model, options)
        command = [
            sys.executable, "-m", "moeq.cli", "quantize", str(model), "-o", str(packed),
            "--bits", options.bits, "--strategy", "random:0" if "." in options.bits else "uniform",
            "--calib", "default", "--nsamples", str(options.nsamples), "--seqlen",
            str(options.seqlen),
        ]  # fmt: skip
        start = time.monotonic()
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
    stated = re.search(r"peak memory +about .*\(([\d,]+) bytes\)", output)
    if stated is None:
        sys.exit("moeq quantize did not state its peak memory")
    activations = STREAMS * 4 * options.nsamples * options.seqlen * options.hidden_size
    limit = BOUND * experts_bytes + activations
    rows = {
        "layers × experts": f"{options.layers} × {options.experts}",
        "hidden / intermediate size": f"{options.hidden_size} / {options.intermediate_size}",
        "calibration tokens": f"{options.nsamples} × {options.seqlen}",
        "bits": options.bits,
        "bfloat16 weights of a layer's experts, GB": f"{experts_bytes / GB:.2f}",
        "activations, GB": f"{activations / GB:.2f}",
        "peak memory of the whole process, GB": f"{peak / GB:.2f}",
        "stated before it runs, without Python and torch, GB": (
            f"{int(stated[1].replace(',', '')) / GB:.2f}"
        ),
        "seconds": f"{seconds:.0f}",
        "seconds for each expert": f"{seconds / (options.layers * options.experts):.0f}",
    }
    write_section(
        options.results,
        f"cost of calibration: {options.layers} × {options.experts} experts of "
        f"{options.hidden_size} / {options.intermediate_size}",
        [
            f"Peak memory is {peak / GB:.2f} GB, which {'meets' if peak < limit else 'MISSES'} the "
            f"limit of {limit / GB:.2f} GB: {BOUND} times the bfloat16 weights of a layer's "
            "experts, plus the activations.",
            table(["", "measured"], rows.items()),
        ],
        packages=("torch", "transformers", "vllm-moeq"),
    )


if __name__ == "__main__":
    main()
