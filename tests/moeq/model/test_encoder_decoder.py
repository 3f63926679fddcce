"""An encoder and its decoder layer by layer, against the whole model of transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from moeq.checkpoint import SourceModel
from moeq.errors import MoeqError
from moeq.model import ExpertSource, LayerwiseModel, layerwise_model, run_layer
from moeq.model.sequences import answered
from moeq.model.text import calibration_sequences, evaluation_sequences
from support.models import VOCABULARY, load_model
from support.sources import load, rewrite

PAD = START = 2
LENGTH, SOURCE = 40, 30
FILLED = [(0, 0), (13, 0), (5, 6), (0, 3)]
"""Tokens of filling at the end of each source and target."""
TINY = "switch_transformers"
TinyModel = Callable[[str], Path]


@pytest.fixture(params=[True, False], ids=[TINY, "untied"])
def folder(request: pytest.FixtureRequest, tiny_model: TinyModel, tmp_path: Path) -> Path:
    """Return a model whose embeddings are one, and one that has four of them."""
    tied = tiny_model(TINY)
    if request.param:
        return tied
    tensors = load(tied)
    for number, name in enumerate(("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")):
        tensors[f"{name}.weight"] = tensors["shared.weight"].roll(number + 1, 0)
    return rewrite(tied, tmp_path / "untied", tensors, tie_word_embeddings=False)


def _tokens() -> torch.Tensor:
    """Return sequences with filling, in which many tokens are alike and experts overflow."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCABULARY, (len(FILLED), LENGTH), generator=generator)
    tokens[1, :20] = tokens[1, 0]
    tokens[:, SOURCE] = START
    for sequence, (of_source, of_target) in zip(tokens, FILLED, strict=True):
        sequence[SOURCE - of_source : SOURCE] = PAD
        sequence[LENGTH - of_target :] = PAD
    return tokens


def _inputs(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    source = tokens[:, :SOURCE]
    mask = torch.ones_like(source)
    for row, (filled, _) in zip(mask, FILLED, strict=True):
        row[SOURCE - filled :] = 0
    return {
        "input_ids": source, "attention_mask": mask, "decoder_input_ids": tokens[:, SOURCE:]
    }  # fmt: skip


class _Seen:
    """What the experts of a whole model get and give, by the path of each."""

    def __init__(self, whole: Any) -> None:
        self.arguments: dict[str, tuple[torch.Tensor, ...]] = {}
        self.sums: dict[str, torch.Tensor] = {}
        for name, module in whole.named_modules():
            if name.endswith("mlp.experts"):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            self.arguments[name], self.sums[name] = args, output

        return hook


def _kept(encoder: bool) -> torch.Tensor:
    """Return bool [n, length]: which places of all sources or targets are no filling."""
    length = SOURCE if encoder else LENGTH - SOURCE
    filled = torch.tensor([pair[0 if encoder else 1] for pair in FILLED])
    return torch.arange(length) < length - filled[:, None]


def _embedded(model: LayerwiseModel, tokens: torch.Tensor) -> torch.Tensor:
    hidden = torch.empty(*tokens.shape, model.hidden_size)
    model.embed(tokens, hidden)
    return hidden


def test_logits_are_those_of_transformers(folder: Path) -> None:
    tokens, whole = _tokens(), load_model(folder).eval()
    seen = _Seen(whole)
    with torch.inference_mode():
        expected = whole(**_inputs(tokens)).logits

    model = layerwise_model(SourceModel.open(folder), torch.device("cpu"))
    hidden = _embedded(model, tokens)
    for index in range(len(model)):
        routed = run_layer(
            model, index, hidden, torch.empty_like(hidden), [ExpertSource.original(model)]
        )
        if routed is None:
            continue
        container = model.moe_layers[index].container
        encoder = container.startswith("encoder")
        x, selected, weights = seen.arguments[container]
        kept = _kept(encoder).flatten()
        places = torch.arange(tokens.numel()).view(tokens.shape)
        places = (places[:, :SOURCE] if encoder else places[:, SOURCE:]).flatten()[kept]
        torch.testing.assert_close(routed.x[places], x[kept], rtol=1e-4, atol=1e-4)
        chosen = selected[kept, 0]
        assert torch.equal(routed.ids[places, 0] >= 0, chosen.any(-1))
        assert torch.equal(routed.ids[places, 0].clamp(min=0), chosen.long().argmax(-1))
        torch.testing.assert_close(routed.weights[places], weights[kept], rtol=1e-4, atol=1e-4)
        # Neither the other part of a sequence nor filling gets an expert.
        others = torch.ones(tokens.numel(), dtype=torch.bool)
        others[places] = False
        assert (routed.ids[others] == -1).all()
    assert any((args[1][:, 0].sum(-1) == 0).any() for args in seen.arguments.values()), "overflow"
    with torch.no_grad():
        for sequence, state, theirs in zip(tokens, hidden, expected, strict=True):
            part = answered(model.source.reader.config, sequence)
            logits = model.logits(state[part])
            torch.testing.assert_close(logits, theirs[: len(logits)], rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_transformers(folder: Path) -> None:
    tokens, whole = _tokens(), load_model(folder).eval()
    seen = _Seen(whole)
    last: list[torch.Tensor] = []
    whole.decoder.block[-1].register_forward_hook(lambda *call: last.append(call[2][0]))
    whole(**_inputs(tokens))
    gradient = torch.zeros(*tokens.shape, last[0].shape[-1])
    gradient[:, SOURCE:] = torch.randn(last[0].shape, generator=torch.Generator().manual_seed(0))
    gradient[:, SOURCE:][~_kept(encoder=False)] = 0
    expected = torch.autograd.grad(last[0], tuple(seen.sums.values()), gradient[:, SOURCE:].clone())

    model = layerwise_model(SourceModel.open(folder), torch.device("cpu"))
    hidden, inputs, routed = _embedded(model, tokens), [], []
    for index in range(len(model)):
        inputs.append(hidden.clone())
        x, sources = torch.empty_like(hidden), [ExpertSource.original(model)]
        routed.append(run_layer(model, index, hidden, x, sources))
    of_sums = torch.empty_like(hidden)
    found = {}
    for index in reversed(range(len(model))):
        x = torch.empty_like(hidden)
        again = model.backward(index, inputs[index], gradient, x, of_sums)
        for theirs, ours in zip(routed[index] or (), again or (), strict=True):
            assert torch.equal(ours, theirs)  # experts get the same on the way back
        if index in model.moe_layers:
            found[model.moe_layers[index].container] = of_sums.clone()
    assert found.keys() == seen.sums.keys()
    for container, theirs in zip(seen.sums, expected, strict=True):
        encoder = container.startswith("encoder")
        ours = found[container][:, :SOURCE] if encoder else found[container][:, SOURCE:]
        kept = _kept(encoder)
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours[kept], theirs.view(ours.shape)[kept], rtol=1e-3, atol=1e-4)


def test_a_text_goes_on_where_its_source_ends(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder, text = tiny_model(TINY), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    tokens = AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"]

    found = evaluation_sequences(folder, str(text), 99, LENGTH, 0)["text"]

    assert len(found) == len(tokens) // (LENGTH - 1)
    windows = {tuple(row[:SOURCE] + row[SOURCE + 1 :]) for row in found.tolist()}
    length = LENGTH - 1
    assert windows == {
        tuple(tokens[i * length : (i + 1) * length]) for i in range(len(tokens) // length)
    }
    assert (found[:, SOURCE] == START).all()


def test_pairs_are_cut_or_filled(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder, pairs = tiny_model(TINY), tmp_path / "pairs.jsonl"
    rows = [("short", "also"), ("long " * 20, "long " * 20)]
    pairs.write_text("\n".join(json.dumps({"source": s, "target": t}) for s, t in rows))
    tokenizer = AutoTokenizer.from_pretrained(folder)

    found = sorted(calibration_sequences(folder, str(pairs), 9, LENGTH, 0).tolist())

    expected = []
    for source, target in rows:
        ids, labels = (tokenizer(text)["input_ids"] for text in (source, target))
        source_part = (ids + [PAD] * LENGTH)[:SOURCE]
        expected.append(source_part + ([START, *labels] + [PAD] * LENGTH)[: LENGTH - SOURCE])
    assert found == sorted(expected)


@pytest.mark.parametrize(
    ("line", "length", "message"),
    [
        ({"source": "a"}, 40, r'pairs.jsonl, line 1: "source" and "target" must both be text'),
        ({"source": "a", "target": " "}, 40, "line 1: .* must both be text"),
        ({"source": "a", "target": "b"}, 7, "`seqlen` 7 leaves no target .* at least 8"),
        ({"text": "abc"}, 7, "`seqlen` 7 leaves no target"),
        ({"texts": "abc"}, 40, 'line 1: no JSON object with a string "text"'),
    ],
)
def test_bad_pairs_are_named(
    line: dict[str, str], length: int, message: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(line))
    with pytest.raises(MoeqError, match=message):
        calibration_sequences(tiny_model(TINY), str(path), 1, length, 0)


def test_text_needs_the_tokens_that_sequences_are_made_with(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model(TINY)
    folder = rewrite(source, tmp_path / "changed", load(source), decoder_start_token_id=None)
    with pytest.raises(MoeqError, match="decoder_start_token_id, .* are 2 and None"):
        calibration_sequences(folder, "default", 1, LENGTH, 0)
