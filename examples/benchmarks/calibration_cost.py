"""Measures peak memory and time of `moeq quantize --calib` on a model of a given shape.

    python examples/benchmarks/calibration_cost.py --layers 8 --experts 8 --work FOLDER

The default is the layer of Mixtral-8x7B: 2.8 GB in bfloat16 with its 8 experts, made of random
weights in FOLDER, which needs the space of the model and twice that of the result. Rounding an
expert of this shape takes about 16 TFLOP, so all of it takes hours on a small CPU: --used 2 gives
all tokens to 2 experts of each layer and rounds the others without calibration. Memory does not
depend on the number of layers; experts of this shape are rounded one at a time, small ones together
as far as that takes no more memory than the 16-bit weights of a layer.

With --kill-after the run is killed (SIGKILL) and resumed, and its first layers are compared with
those of a run that was left alone.
"""

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from results import RESULTS, table, write_section
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MixtralConfig, PreTrainedTokenizerFast

from moeq.bench import GB
from moeq.calibration import REPORT_NAME
from moeq.calibration.cost import STREAMS

INDEX = "model.safetensors.index.json"
BOUND = 3
"""Peak memory must stay below so many times a layer's bfloat16 weights, plus activations."""
CONSTANT = 4.0
"""One channel of all tokens, by which routers avoid the experts that are not used."""


def write_model(folder: Path, options: argparse.Namespace) -> int:
    """Write a random checkpoint, a file for each layer; return the bytes of a layer's experts."""
    # A fixed model: few others give tokens to experts that are not to be used.
    torch.manual_seed(0)
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
        tensors[f"{prefix}block_sparse_moe.gate.weight"][options.used :, 0] = -CONSTANT
        experts_bytes = sum(t.nbytes for name, t in tensors.items() if ".experts." in name)
        write(f"layer-{index}.safetensors", tensors)
    around = {
        "model.embed_tokens.weight": random(256, hidden),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
        "lm_head.weight": random(256, hidden),
    }
    if options.used < options.experts:
        around["model.embed_tokens.weight"][:, 0] = CONSTANT
    write("around.safetensors", around)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return experts_bytes


def cut(model: Path, layers: int, folder: Path) -> None:
    """Write the model's first layers as a model of its own: links to the files of the other."""
    folder.mkdir()
    index = json.loads((model / INDEX).read_text())
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    files = {"around.safetensors", *(f"layer-{layer}.safetensors" for layer in range(layers))}
    for file in files:
        (folder / file).symlink_to(model / file)
    index["weight_map"] = {k: file for k, file in index["weight_map"].items() if file in files}
    (folder / INDEX).write_text(json.dumps(index))
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config))


def quantize(model: Path, packed: Path, options: argparse.Namespace, kills: list[float]) -> str:
    """Run `moeq quantize`, killed and resumed after so many seconds each; return its output."""
    command = [
        sys.executable, "-m", "moeq.cli", "quantize", str(model), "-o", str(packed),
        "--bits", options.bits, "--strategy", "random:0" if "." in options.bits else "uniform",
        "--calib", "default", "--nsamples", str(options.nsamples), "--seqlen", str(options.seqlen),
    ]  # fmt: skip
    for seconds in kills:
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=seconds)
        except subprocess.TimeoutExpired:  # it was killed with SIGKILL
            print(f"killed after {seconds:g} s", flush=True)
        else:
            sys.exit(f"it ended within {seconds:g} s, before it could be killed")
        if "--resume" not in command:
            command.append("--resume")
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def expert_tensors(packed: Path, layers: int) -> dict[str, torch.Tensor]:
    """Read what the experts of the first layers have become."""
    found: dict[str, torch.Tensor] = {}
    for file in packed.glob("*.safetensors"):
        found |= {
            name: tensor
            for name, tensor in load_file(file).items()
            if ".experts." in name and int(name.split(".")[2]) < layers
        }
    return found


def count_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> int:
    """Count tensors that are the same in both; stop if others have the same name in only one."""
    if first.keys() != second.keys():
        sys.exit("the two runs did not round the same experts")
    return sum(torch.equal(tensor, second[name]) for name, tensor in first.items())


def main() -> None:
    """Measure, and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1, help="default 1")
    parser.add_argument("--experts", type=int, default=8, help="of each layer (default 8)")
    parser.add_argument("--used", type=int, help="how many of them get tokens (default: all)")
    parser.add_argument("--hidden-size", type=int, default=4096, help="default 4096")
    parser.add_argument("--intermediate-size", type=int, default=14336, help="default 14336")
    parser.add_argument("--bits", default="2", help="as in moeq quantize (default 2)")
    parser.add_argument("--nsamples", type=int, default=32, help="default 32")
    parser.add_argument("--seqlen", type=int, default=512, help="default 512")
    parser.add_argument("--kill-after", type=float, nargs="+", default=[], metavar="SECONDS")
    parser.add_argument("--compare-layers", type=int, default=2, help="after kills (default 2)")
    parser.add_argument("--work", type=Path, help="folder for the model and the result")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"default: {RESULTS}")
    options = parser.parse_args()
    options.used = options.used or options.experts
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        model, packed = Path(work) / "model", Path(work) / "packed"
        experts_bytes = write_model(model, options)
        start = time.monotonic()
        output = quantize(model, packed, options, options.kill_after)
        seconds = time.monotonic() - start
        coverage = json.loads((packed / REPORT_NAME).read_text())
        counts = [count for found in coverage["experts"].values() for count in found["tokens"]]
        uncalibrated = sum(count < coverage["fewest_tokens"] for count in counts)
        if options.kill_after:
            beginning, alone = Path(work) / "beginning", Path(work) / "alone"
            cut(model, options.compare_layers, beginning)
            quantize(beginning, alone, options, [])
            tensors = expert_tensors(alone, options.compare_layers)
            same = count_equal(tensors, expert_tensors(packed, options.compare_layers))
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
        "experts rounded without calibration": str(uncalibrated),
        "bfloat16 weights of a layer's experts, GB": f"{experts_bytes / GB:.2f}",
        "activations, GB": f"{activations / GB:.2f}",
        "peak memory of the whole process, GB": f"{peak / GB:.2f}",
        "stated before it runs, without Python and torch, GB": (
            f"{int(stated[1].replace(',', '')) / GB:.2f}"
        ),
        "seconds": f"{seconds:.0f}",
    }
    if options.used == options.experts and not options.kill_after:
        each = seconds / (options.layers * options.experts)
        rows["seconds for each expert"] = f"{each:.0f}"
    if options.kill_after:
        rows["killed and resumed after seconds"] = ", ".join(f"{s:g}" for s in options.kill_after)
        rows[f"tensors of the first {options.compare_layers} layers equal without a kill"] = (
            f"{same} of {len(tensors)}"
        )
    write_section(
        options.results,
        "Cost of calibration",
        f"cost of calibration: {options.layers} × {options.experts} experts of "
        f"{options.hidden_size} / {options.intermediate_size}"
        + (f", {options.used} used" if options.used < options.experts else ""),
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
