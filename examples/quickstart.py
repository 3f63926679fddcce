"""From a trained MoE to an answer out of ``vllm serve --quantization moeq``.

examples/quickstart.sh sets up the environment and then runs this.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from corpus import split
from perplexity import call, perplexity, reference_perplexity
from serving import ServerError, exit_on_sigterm, vllm_server

from moeq.checkpoint.reader import CheckpointReader, resolve_model
from moeq.checkpoint.verify import read_plan
from moeq.checkpoint.wording import linear_summary

EXAMPLES = Path(__file__).resolve().parent
BITS = "2.5"
PROMPT = "Return the"
PERPLEXITY_TOKENS = 8192
SERVE_OPTIONS = ["--quantization", "moeq", "--max-model-len", "512", "--max-num-seqs", "8"]
CPU_OPTIONS = [
    # Starts a minute faster than a compiled model.
    "--enforce-eager",
    # vLLM's own CPU rotary op, which eager mode would use, is wrong for DeepSeek models.
    "--compilation-config",
    '{"custom_ops": ["none"]}',
]


def run(*command: object) -> None:
    """Run a step as a process; its failure ends the quickstart."""
    subprocess.run([str(word) for word in command], check=True)


def tensor_bytes(model: str | Path) -> int:
    """Return the bytes of all tensors of a checkpoint."""
    reader = CheckpointReader(resolve_model(str(model)))
    return sum(info.num_bytes for info in reader.tensors.values())


def sixteen_bit_bytes(model: str | Path) -> int:
    """Return the bytes of a checkpoint as it is served unquantized: two for each weight."""
    reader = CheckpointReader(resolve_model(str(model)))
    return sum(2 * torch.Size(info.shape).numel() for info in reader.tensors.values())


def main() -> int:
    """Train if need be, quantize, serve, ask, measure and print; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Other options go to `moeq quantize`, as in --group-size 64.",
        prog="quickstart.sh",
    )
    parser.add_argument("model", nargs="?", help="folder or hub id; default: train a small one")
    parser.add_argument(
        "--no-baseline",
        action="store_true",
        help="do not run the 16-bit model, for models that do not fit into memory",
    )
    parser.add_argument("--seconds", default="120", help="training time of the small model")
    parser.add_argument(
        "--work",
        type=Path,
        default=os.path.relpath(EXAMPLES.parent / "build" / "quickstart"),
        help="output folder (default: build/quickstart in the clone)",
    )
    options, quantize_options = parser.parse_known_args()
    exit_on_sigterm()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    model = options.model
    if model is None:
        tiny = work / "tiny"
        shutil.rmtree(tiny, ignore_errors=True)
        print("== training a small Mixtral on the text inside CPython", flush=True)
        run(sys.executable, EXAMPLES / "train_tiny_moe.py", tiny, "--seconds", options.seconds)
        model = str(tiny / "model")
        quantize_options += ["--base-router", str(tiny / "routers.safetensors")]
    packed = work / f"{Path(model).resolve().name}-moeq"
    text = "\n\n".join(split()[1])
    (work / "heldout.txt").write_text(text, encoding="utf-8")

    print(f"== quantizing {model} to {BITS} bits", flush=True)
    shutil.rmtree(packed, ignore_errors=True)
    run("moeq", "quantize", model, "-o", packed, "--bits", BITS, *quantize_options)
    run("moeq", "verify", packed)

    before = "not measured"
    if not options.no_baseline:
        # Not with vLLM: on CPUs without AVX-512 its own unquantized experts can be wrong.
        print("== measuring the perplexity of the 16-bit model with transformers", flush=True)
        before = f"{reference_perplexity(model, text, PERPLEXITY_TOKENS):.4f}"

    print(f"== vllm serve {packed} --quantization moeq", flush=True)
    serve_options = SERVE_OPTIONS + ([] if torch.cuda.is_available() else CPU_OPTIONS)
    with vllm_server(packed, work / "server.log", *serve_options) as server:
        body = {"model": str(packed), "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
        answer = call(f"{server}/v1/completions", body)["choices"][0]["text"]
        after = f"{perplexity(server, text, PERPLEXITY_TOKENS):.4f}"

    plan = read_plan(CheckpointReader(packed))
    facts = plan.provenance
    print()
    print(f"prompt    {PROMPT}")
    print(f"answer    {answer!r}")
    print(f"16-bit    {sixteen_bit_bytes(model) / 1e6:10.2f} MB   held-out perplexity {before}")
    print(f"packed    {tensor_bytes(packed) / 1e6:10.2f} MB   held-out perplexity {after}")
    print(
        f"experts   {facts.achieved_bits:.4f} bits on average, "
        f"{facts.bits_per_weight:.4f} with scales and zero points"
    )
    print(f"dense     {linear_summary(plan)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"quickstart: this step failed: {' '.join(error.cmd)}")
    except (ServerError, OSError) as error:
        sys.exit(f"quickstart: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
