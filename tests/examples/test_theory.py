"""The theory lab: its model against a literal one, and the part of the paper that reproduces."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

THEORY = Path(__file__).parents[2] / "examples" / "theory"


@pytest.fixture(scope="module")
def lab() -> Iterator[SimpleNamespace]:
    """Give the modules of the theory lab."""
    sys.path.insert(0, str(THEORY))
    try:
        import figure
        import learning
        import plans
        import rare_features
        import setting

        yield SimpleNamespace(
            figure=figure,
            learning=learning,
            plans=plans,
            rare_features=rare_features,
            setting=setting,
        )
    finally:
        sys.path.remove(str(THEORY))


def literal_output(
    router: torch.Tensor, experts: torch.Tensor, sign: list[float], tokens: list[int], capacity: int
) -> float:
    """Compute the output for one sequence of one run, number by number."""
    output = 0.0
    for scores, neurons, direction in zip(router.tolist(), experts.tolist(), sign, strict=True):
        order = sorted(range(len(tokens)), key=lambda place: -scores[tokens[place]])[:capacity]
        total = sum(math.exp(scores[tokens[place]]) for place in order)
        for place in order:
            answer = sum(max(0.0, row[tokens[place]]) for row in neurons) / len(neurons)
            output += direction * math.exp(scores[tokens[place]]) / total * answer
    return output


def test_forward_is_the_model_of_the_setting(lab: SimpleNamespace) -> None:
    setting = lab.setting.Setting(patterns=12, neurons=3, idle=2, capacity=3, weight_std=1.0)
    generator = torch.Generator().manual_seed(0)
    weights = lab.setting.initial_weights(2, setting, generator)
    data = lab.setting.draw(torch.tensor([0.1, 0.5]), 5, setting, generator)
    routing = lab.setting.route(weights.router, data.tokens, setting.capacity)
    output = lab.setting.forward(routing, weights.experts, setting)
    sign = [1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0, 1.0, -1.0]
    for run in range(2):
        for sequence, tokens in enumerate(data.tokens[run].tolist()):
            wanted = literal_output(weights.router[run], weights.experts[run], sign, tokens, 3)
            assert output[run, sequence].item() == pytest.approx(wanted, abs=1e-5)


def test_sequences_have_one_task_pattern_that_gives_the_label(lab: SimpleNamespace) -> None:
    setting = lab.setting.Setting()
    data = lab.setting.draw(torch.tensor([0.05, 0.5]), 4000, setting, torch.Generator())
    is_task = data.tokens < 4
    assert (is_task.sum(-1) == 1).all()
    task = data.tokens[is_task].view(2, -1)
    assert torch.equal(data.labels, torch.where(task < 2, 1.0, -1.0))
    assert torch.equal(data.rare, task % 2 == 1)
    assert data.rare.float().mean(1).tolist() == pytest.approx([0.05, 0.5], abs=0.03)


def test_a_step_descends_the_hinge_loss(lab: SimpleNamespace) -> None:
    # The gradient that a step of SGD implies, against differences of the literal float64 loss.
    setting = lab.setting.Setting(
        patterns=8, neurons=2, per_task=1, sequence=4, batch=6, weight_std=3.0
    )
    rate = torch.tensor([0.5])
    start = lab.setting.initial_weights(1, setting, torch.Generator().manual_seed(3))
    (after,) = lab.setting.train(start, rate, setting, [1], torch.Generator().manual_seed(4))
    data = lab.setting.draw(rate, 6, setting, torch.Generator().manual_seed(4))
    hinge_is_on = lab.setting.margins(start, data, setting) < 1
    assert 0 < hinge_is_on.sum() < 6
    router, experts = start.router[0].double(), start.experts[0].double()

    def loss() -> float:
        pairs = zip(data.labels[0].tolist(), data.tokens[0].tolist(), strict=True)
        sign = [1.0, 1.0, -1.0, -1.0]
        hinges = (
            max(0.0, 1 - label * literal_output(router, experts, sign, tokens, 2))
            for label, tokens in pairs
        )
        return sum(hinges) / 6

    def differences(part: torch.Tensor) -> torch.Tensor:
        found = torch.empty_like(part)
        for index in range(part.numel()):
            value = part.view(-1)[index].item()
            above, below = (
                (part.view(-1)[index].fill_(value + shift), loss())[1] for shift in (1e-6, -1e-6)
            )
            part.view(-1)[index] = value
            found.view(-1)[index] = (above - below) / 2e-6
        return found

    for old, new, part, step in (
        (start.router, after.router, router, setting.router_rate),
        (start.experts, after.experts, experts, setting.expert_rate),
    ):
        gradient = (old - new)[0].double() / step
        assert gradient.abs().max() > 0.01
        torch.testing.assert_close(gradient, differences(part), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_rare_experts_have_the_smaller_change_until_the_hinge_ends(
    lab: SimpleNamespace, seed: int
) -> None:
    setting, runs = lab.setting.Setting(), 6
    generator = torch.Generator().manual_seed(seed)
    start = lab.setting.initial_weights(runs, setting, generator)
    test = lab.setting.draw_test(runs, setting, generator)
    rate = torch.full((runs,), 0.2)
    early, late = lab.setting.train(start, rate, setting, [50, 400], generator)

    change = lab.setting.norm_change(start, early)
    rare, frequent = change[:, setting.is_rare], change[:, setting.is_frequent]
    assert lab.setting.margins(early, test, setting)[test.rare].mean() < 0.4
    assert (lab.setting.rare_first_auc(change, setting) == 1).all()
    assert (frequent.amin(1) > 1.1 * rare.amax(1)).all()
    assert frequent.mean() > 5 * rare.mean()

    change = lab.setting.norm_change(start, late)
    rare, frequent = change[:, setting.is_rare], change[:, setting.is_frequent]
    assert lab.setting.margins(late, test, setting)[test.rare].mean() > 0.95
    assert (lab.setting.rare_first_auc(change, setting) < 0.9).sum() >= runs / 3
    assert frequent.mean() < 2 * rare.mean()


def test_without_a_rare_pattern_no_order_arises(lab: SimpleNamespace) -> None:
    setting, runs = lab.setting.Setting(), 20
    generator = torch.Generator().manual_seed(0)
    start = lab.setting.initial_weights(runs, setting, generator)
    (weights,) = lab.setting.train(start, torch.full((runs,), 0.5), setting, [50], generator)
    auc = lab.setting.rare_first_auc(lab.setting.norm_change(start, weights), setting)
    assert 0.3 < auc.mean() < 0.7


def test_experts_that_prefer_nothing_have_small_changes_too(lab: SimpleNamespace) -> None:
    setting = lab.setting.Setting(idle=8)
    models = lab.plans.Trained(setting, 0.05, 50, 10, 0)
    first = models.change.argsort(1)[:, : setting.experts // 2]
    assert (setting.own_pattern[first] < 0).float().mean() > 0.5


def test_auc_counts_pairs(lab: SimpleNamespace) -> None:
    # Experts 2, 3, 6 and 7 are those of rare patterns.
    change = torch.tensor([[4.0, 5.0, 1.0, 4.0, 6.0, 7.0, 2.0, 9.0]])
    auc = lab.setting.rare_first_auc(change, lab.setting.Setting())
    assert auc.item() == (4 + 3.5 + 4 + 0) / 16


def test_the_background_changes_weights_but_no_output(lab: SimpleNamespace) -> None:
    setting = lab.setting.Setting()
    generator = torch.Generator().manual_seed(0)
    experts = lab.setting.initial_weights(2, setting, generator).experts
    embedding = lab.plans.Embedding(2, setting, generator)
    full = embedding.embed(experts, 0.5)
    assert full.std() > 0.3
    torch.testing.assert_close(embedding.products(full), experts, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grids_span_all_weights_and_round_to_the_nearest_level(
    lab: SimpleNamespace, bits: int
) -> None:
    weights = torch.randn(1, 2, 3, 64, generator=torch.Generator().manual_seed(0))
    weights[0, 1] *= 3
    groups = weights.view(-1, 32)
    steps = {
        lab.plans.symmetric: 2 * groups.abs().amax(1, keepdim=True) / (2**bits - 1),
        lab.plans.shared: (weights.max() - weights.min()).expand(len(groups), 1) / (2**bits - 1),
    }
    for rounding, step in steps.items():
        rounded = rounding(weights, bits).view(-1, 32)
        assert all(len(group.unique()) <= 2**bits for group in rounded)
        assert ((rounded - groups).abs() <= step / 2 * 1.0001).all()


def test_small_change_first_pays_off_only_while_the_variances_are_alike(
    lab: SimpleNamespace,
) -> None:
    models = lab.plans.Trained(lab.setting.Setting(), 0.05, 50, 60, 0)
    leads = []
    for background in (0.0, 0.4):
        cost = models.costs(background, (3, 1), lab.plans.product)
        assert (cost.frequent["small Λ"] > 0.99).all()
        leads.append((cost.rare["small Λ"] - cost.rare["large Λ"]).mean().item())
        if background:
            assert cost.variance_ratio.mean() < 1.5
        else:
            assert cost.variance_ratio.mean() > 3
            assert cost.rare["combined"].mean() > cost.rare["small Λ"].mean()
    assert leads[0] < -0.02
    assert leads[1] - leads[0] > 0.05


def test_rank_correlation_is_spearmans(lab: SimpleNamespace) -> None:
    first = torch.tensor([[1.0, 2.0], [3.0, 40.0]])
    second = torch.tensor([[10.0, 30.0], [20.0, 99.0]])
    # 1 - 6 * sum of squared rank differences / (n * (n^2 - 1)), which are 0, 1, 1 and 0.
    assert lab.learning.rank_correlation(first, second) == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_the_command_writes_its_section_and_figure(
    lab: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = lab.rare_features
    for module in (lab.learning, lab.figure, command):
        monkeypatch.setattr(module, "STOPS", (2, 4))
    monkeypatch.setattr(command, "REGIMES", command.REGIMES[:1])
    (tmp_path / "README.md").write_text("# Words of ours\n")
    arguments = f"rare_features.py --runs 2 --plan-runs 2 --folder {tmp_path}"
    monkeypatch.setattr(sys, "argv", arguments.split())
    threads = torch.get_num_threads()
    try:
        command.main()
    finally:
        torch.set_num_threads(threads)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Words of ours\n")
    assert "| α | 2 steps | 4 steps |" in text
    assert "| default | " in text
    assert "</svg>" in (tmp_path / "rare_features.svg").read_text()
