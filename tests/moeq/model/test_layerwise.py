"""Layers one at a time against the whole model of transformers, for every family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moeq.checkpoint import SourceModel
from moeq.checkpoint.families import family_of
from moeq.errors import MoeqError
from moeq.evaluation.reference import outputs
from moeq.model import ExpertSource, run_layer
from moeq.model.layerwise import LayerwiseModel
from support.models import (
    FAMILIES,
    NOT_LAYERWISE,
    NUM_EXPERTS,
    VOCABULARY,
    decoder_layers,
    load_model,
)
from support.sources import load, rewrite

ATOL = {
    "deepseek_v3": 5e-4, "deepseek_v32": 5e-4, "kimi_k2": 5e-4, "qwen3_next": 5e-4,
    "granitemoeshared": 2e-3,
}  # fmt: skip
"""Where gradients reach 900: transformers' own, in float32, are 0.0015 and 0.025 from float64's."""
CPU = torch.device("cpu")
every_family = pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family not in NOT_LAYERWISE]
)


class _Seen:
    """What the layers of a whole model get and give, by their number, and experts in them."""

    def __init__(self, whole: Any, family: str) -> None:
        self.arguments: dict[int, tuple[torch.Tensor, ...]] = {}
        self.sums: dict[int, torch.Tensor] = {}
        self.inputs: dict[int, torch.Tensor] = {}
        self.outputs: dict[int, torch.Tensor] = {}
        self.normed: dict[int, torch.Tensor] = {}
        norm = family_of({"model_type": family}).norm
        for index, layer in enumerate(decoder_layers(whole)):
            layer.register_forward_pre_hook(self._enter(index))
            layer.register_forward_hook(self._leave(self.outputs, index))
            for name, module in layer.named_modules():
                if name.rpartition(".")[2] == "experts":
                    module.register_forward_hook(self._experts(index), with_kwargs=True)
                elif name == norm and norm:
                    module.register_forward_hook(self._leave(self.normed, index))

    def _enter(self, index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            self.inputs[index] = args[0]

        return hook

    @staticmethod
    def _leave(outputs: dict[int, torch.Tensor], index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            outputs[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def _experts(self, index: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            self.arguments[index] = (*args, *kwargs.values())
            self.sums[index] = output

        return hook

    def of_expert(self, index: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what an expert gets: tokens [n, H], in order, and router weights [n, 1]."""
        x, *routing = self.arguments[index]
        if not routing:  # Llama-4: all tokens for each expert, of which most are zeros
            x = x.view(NUM_EXPERTS, -1, x.shape[-1])[expert]
            x = x[x.abs().sum(-1) > 0]
            return x, torch.ones(len(x), 1)
        ids, weights = routing
        places, turns = (ids == expert).nonzero(as_tuple=True)
        return x[places], weights[places, turns, None]


@every_family
def test_logits_are_those_of_transformers(family: str, tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model(family)
    tokens = torch.randint(VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))
    whole = load_model(folder).eval()
    seen = _Seen(whole, family)
    with torch.inference_mode():
        expected = whole(tokens).logits

    source = SourceModel.open(folder)
    model = LayerwiseModel(source, CPU)
    hidden = torch.empty(*tokens.shape, model.hidden_size)
    x = torch.empty_like(hidden)
    model.embed(tokens, hidden)
    for index in range(len(model)):
        routed = run_layer(model, index, hidden, x, [ExpertSource.original(model)])
        if routed is None:
            continue
        named = family_of({"model_type": family})
        if named.norm and not named.scaled_inputs:
            normed = seen.normed[index].flatten(0, -2)
            torch.testing.assert_close(routed.x, normed, rtol=1e-4, atol=1e-4)
        for expert in range(model.moe_layers[index].num_experts):
            places, weights = routed.of_expert(expert)
            theirs, their_weights = seen.of_expert(index, expert)
            torch.testing.assert_close(routed.x[places], theirs, rtol=1e-4, atol=1e-4)
            scale = 0.5 if family == "granitemoe" else 1  # its residual_multiplier
            torch.testing.assert_close(weights, scale * their_weights, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        logits = torch.stack([model.logits(sequence) for sequence in hidden])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_watching_tells_what_dense_layers_get_and_runs_no_further(
    family: str, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(family)
    tokens = torch.randint(VOCABULARY, (5, 24), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("moeq.model.layerwise.TOKENS_AT_ONCE", 48)  # two sequences, then one
    source = SourceModel.open(folder)
    model = LayerwiseModel(source, CPU)
    last = len(model) - 1
    names = [
        name
        for group in source.linear
        for name in group.weights
        if group.layer == last and ".self_attn." in name
    ]
    whole, expected = load_model(folder).eval(), dict[str, torch.Tensor]()
    for name in names:

        def keep(module: Any, args: Any, output: Any, name: str = name) -> None:
            expected[name] = args[0]

        whole.get_submodule(name.removesuffix(".weight")).register_forward_hook(keep)
    with torch.inference_mode():
        whole(tokens)
    hidden, x = torch.empty(2, *tokens.shape, model.hidden_size)
    model.embed(tokens, hidden)
    for index in range(last):
        run_layer(model, index, hidden, x, [ExpertSource.original(model)])
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    behind: list[object] = []
    model._layers[last].post_attention_layernorm.register_forward_hook(
        lambda *arguments: behind.append(arguments)
    )

    def told(name: str) -> Callable[[torch.Tensor, torch.Tensor], None]:
        return lambda x, output: found[name].append(x)

    model.watch(last, hidden, {}, {name: told(name) for name in names})

    assert len(names) >= 4 and not behind
    for name in names:
        torch.testing.assert_close(torch.cat(found[name]), expected[name], rtol=1e-4, atol=1e-4)


def test_logits_are_the_same_again(tiny_model: Callable[[str], Path]) -> None:
    """Also those of a model that scales its embeddings."""
    model = LayerwiseModel(SourceModel.open(tiny_model("granitemoe")), CPU)
    tokens = torch.randint(VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(0))
    sources = [ExpertSource.original(model)]
    first, second = (list(outputs(model, sources, tokens))[0][0] for _ in range(2))
    assert torch.equal(first.log_probabilities, second.log_probabilities)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama4_text", {"num_experts_per_tok": 2}, "scales what several experts get"),
        ("gemma4_text", {"hidden_size_per_layer_input": 8}, "gives each layer another embedding"),
        ("gemma4_text", {"num_kv_shared_layers": 1}, "shares keys and values between layers"),
        ("deepseek_v4", {}, "has several residual streams"),
        ("glm5_next", {}, "has several residual streams"),
    ],
)
def test_layers_that_get_more_than_hidden_states_are_refused(
    family: str,
    changes: dict[str, int],
    message: str,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    source = tiny_model(family)
    folder = rewrite(source, tmp_path / "changed", load(source), **changes)
    message += ".*with `--calib none`, evaluate with `--backend"
    with pytest.raises(MoeqError, match=message):
        LayerwiseModel(SourceModel.open(folder), CPU)


def test_sequences_that_sparse_attention_chooses_from_are_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_model("glm_moe_dsa")
    folder = rewrite(source, tmp_path / "changed", load(source), index_topk=32)
    model = LayerwiseModel(SourceModel.open(folder), CPU)
    model.embed(torch.zeros(1, 32, dtype=torch.int64), torch.empty(1, 32, 128))
    with pytest.raises(MoeqError, match=r"32 tokens \(index_topk\).*`seqlen` of at most 32"):
        model.embed(torch.zeros(1, 33, dtype=torch.int64), torch.empty(1, 33, 128))


def test_models_that_tell_of_their_routers_have_the_same_logits(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """As configurations do that are left from training."""
    source = tiny_model("mixtral")
    told = rewrite(source, tmp_path / "told", load(source), output_router_logits=True)
    hidden = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    logits = []
    for folder in (source, told):
        model = LayerwiseModel(SourceModel.open(folder), CPU)
        model.embed(torch.zeros(1, 4, dtype=torch.int64), torch.empty(1, 4, 128))
        with torch.no_grad():
            logits.append(model.logits(hidden))
    assert torch.equal(*logits)


@every_family
def test_gradients_are_those_of_transformers(
    family: str, tiny_model: Callable[[str], Path]
) -> None:
    folder = tiny_model(family)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, 24), generator=generator)
    whole = load_model(folder).eval()
    seen = _Seen(whole, family)
    whole(tokens)
    embedded, last = seen.inputs[0], len(seen.inputs) - 1
    gradient = torch.randn(embedded.shape, generator=generator)
    expected, *of_experts = torch.autograd.grad(
        seen.outputs[last], (embedded, *seen.sums.values()), gradient.clone()
    )

    source = SourceModel.open(folder)
    model = LayerwiseModel(source, CPU)
    hidden = torch.empty(embedded.shape)
    model.embed(tokens, hidden)
    inputs, routed = [], []
    for index in range(len(model)):
        inputs.append(hidden.clone())
        x, sources = torch.empty_like(hidden), [ExpertSource.original(model)]
        routed.append(run_layer(model, index, hidden, x, sources))
    of_sums = {index: torch.empty_like(hidden) for index in range(len(model))}
    for index in reversed(range(len(model))):
        x = torch.empty_like(hidden)
        again = model.backward(index, inputs[index], gradient, x, of_sums[index])
        for theirs, ours in zip(routed[index] or (), again or (), strict=True):
            assert torch.equal(ours, theirs)  # experts get the same on the way back
    atol = ATOL.get(family, 1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=atol)
    for index, theirs in zip(seen.sums, of_experts, strict=True):
        ours = of_sums[index].flatten(0, 1)
        # Llama-4's experts give all tokens each, to be added up.
        theirs = theirs[: len(ours)] / (0.5 if family == "granitemoe" else 1)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=atol)
