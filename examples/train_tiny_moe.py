"""Train a small Mixtral-architecture model on English text that ships inside CPython.

    python examples/train_tiny_moe.py OUTPUT [--seconds 120] [--experts 32 --top-k 4 ...]

Writes OUTPUT/model (a Hugging Face checkpoint) and OUTPUT/routers.safetensors, the initial routers
as recorded by ``moeq.RouterNormTracker``. The model learns little in two minutes; it is there to
have real, trained experts and routers to quantize.
"""

import argparse
import math
import os
import time
from pathlib import Path

import torch
from byte_bpe import train_byte_bpe
from corpus import split
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from moeq import RouterNormTracker

VOCABULARY = 2048
SEQUENCE = 128
BATCH = 16
PEAK_LEARNING_RATE = 4e-3
WARM_UP = 0.05
"""Share of the time in which the learning rate rises."""


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
    tokenizer = train_byte_bpe(texts, VOCABULARY, ["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def new_model(options: argparse.Namespace) -> MixtralForCausalLM:
    """Return an untrained model; by default about 3 million parameters."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=options.intermediate_size,
            num_hidden_layers=options.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=options.experts,
            num_experts_per_tok=options.top_k,
            max_position_embeddings=1024,
            router_aux_loss_coef=0.01,
            output_router_logits=True,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def learning_rate(progress: float) -> float:
    """Return the learning rate at a share of the training time: linear warm-up, then cosine."""
    if progress < WARM_UP:
        return PEAK_LEARNING_RATE * progress / WARM_UP
    return PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * progress))


def take_step(
    model: MixtralForCausalLM, optimizer: torch.optim.Optimizer, batch: torch.Tensor
) -> float:
    """Learn from a batch of tokens [n, L]; return its loss."""
    loss = model(input_ids=batch, labels=batch).loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.item())


def train(model: MixtralForCausalLM, tokens: torch.Tensor, routers: Path, seconds: float) -> None:
    """Train for a time on random windows of ``tokens`` [N]; record the routers."""
    tracker = RouterNormTracker(routers, model, every=20)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    started, step, progress = time.monotonic(), 0, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        starts = torch.randint(len(tokens) - SEQUENCE, (BATCH,))
        batch = torch.stack([tokens[start : start + SEQUENCE] for start in starts])
        loss = take_step(model, optimizer, batch)
        tracker.step()
        step += 1
        progress = (time.monotonic() - started) / seconds
        if step % 50 == 0:
            print(f"step {step:5}  {100 * progress:5.1f} % of the time  loss {loss:.3f}")
    tracker.save()
    print(f"trained {step} steps, {step * BATCH * SEQUENCE / 1e6:.1f} M tokens")


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument("--seconds", type=float, default=120, help="training time (default 120)")
    parser.add_argument("--layers", type=int, default=3, help="default 3")
    parser.add_argument("--experts", type=int, default=8, help="of each layer (default 8)")
    parser.add_argument("--top-k", type=int, default=2, help="experts of a token (default 2)")
    parser.add_argument(
        "--intermediate-size", type=int, default=256, help="of each expert (default 256)"
    )
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} exists already; give the name of a new folder")

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))
    texts, _ = split()
    tokenizer = train_tokenizer(texts)
    tokens = torch.tensor(tokenizer("\n\n".join(texts))["input_ids"])
    print(f"{len(texts)} documents, {len(tokens) / 1e6:.2f} M tokens")
    model = new_model(options)
    options.output.mkdir(parents=True)
    train(model, tokens, options.output / "routers.safetensors", options.seconds)
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(options.output / "model")
    tokenizer.save_pretrained(options.output / "model")


if __name__ == "__main__":
    main()
