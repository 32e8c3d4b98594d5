"""Losses and mixup, held against formulas in numpy, and at the edges of what floats can do."""

from typing import Any

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from config.load import validate
from config.train import LossSettings, TrainSettings
from fusion.models import build_model
from fusion.models.base import Batch
from fusion.train.losses import Objective, TaggingLoss, class_weights, mixed, mixed_with
from tests.support.fusion import support

Numbers = Any  # float64


def numpy_costs(settings: LossSettings, x: Numbers, t: Numbers) -> Numbers:
    """The definitions, in float64, from probabilities."""
    p = 1 / (1 + np.exp(-x))
    t = t * (1 - settings.label_smoothing) + settings.label_smoothing / 2
    if settings.name == "focal":
        g, a = settings.focal.gamma, settings.focal.alpha
        positive, negative = (1.0, 1.0) if a is None else (a, 1 - a)
        return -positive * t * (1 - p) ** g * np.log(p) - negative * (1 - t) * p**g * np.log(1 - p)
    if settings.name == "asymmetric":
        options = settings.asymmetric
        q = np.maximum(p - options.margin, 0)
        power = np.where(q > 0, q, 1.0) ** options.gamma_negative * (q > 0)
        cost = -(1 - t) * power * np.log(1 - q)
        return cost - t * (1 - p) ** options.gamma_positive * np.log(p)
    return -t * np.log(p) - (1 - t) * np.log(1 - p)


SETTINGS: dict[str, dict[str, Any]] = {
    "bce": {},
    "bce smoothed": {"label_smoothing": 0.3},
    "focal": {"name": "focal"},
    "focal alpha": {"name": "focal", "focal": {"alpha": 0.25, "gamma": 1.5}},
    "focal flat": {"name": "focal", "focal": {"gamma": 0}},
    "focal root": {"name": "focal", "focal": {"gamma": 0.5}, "label_smoothing": 0.1},
    "asymmetric": {"name": "asymmetric"},
    "asymmetric even": {
        "name": "asymmetric",
        "asymmetric": {"gamma_positive": 1, "gamma_negative": 1, "margin": 0},
    },
    "asymmetric root": {
        "name": "asymmetric",
        "asymmetric": {"gamma_positive": 0.5, "gamma_negative": 0.5, "margin": 0.2},
    },
    "asymmetric bare": {
        "name": "asymmetric",
        "asymmetric": {"gamma_positive": 0, "gamma_negative": 0, "margin": 0},
    },
}


def logits_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and targets of which some are soft and a row is all zero."""
    chance = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 5, generator=chance) * 3
    targets = (torch.rand(9, 5, generator=chance) < 0.4).float()
    targets[3] = 0
    targets[5] = torch.rand(5, generator=chance)
    return logits, targets


@pytest.mark.parametrize("name", SETTINGS)
def test_a_loss_equals_its_formula(name: str) -> None:
    """Value and gradient, the latter by differences of the formula, for hard and soft targets."""
    settings = LossSettings.model_validate(SETTINGS[name])
    logits, targets = logits_and_targets()
    logits.requires_grad_()
    loss = TaggingLoss(settings, torch.ones(5))(logits, targets)
    x, t = logits.detach().double().numpy(), targets.double().numpy()
    assert loss.item() == pytest.approx(numpy_costs(settings, x, t).mean(), rel=1e-5)
    loss.backward()
    slope = (numpy_costs(settings, x + 1e-6, t) - numpy_costs(settings, x - 1e-6, t)) / 2e-6
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad * x.size, slope, atol=2e-5)


def two_way_in_numpy(x: Numbers, t: Numbers, weights: Numbers) -> float:
    """The definition, one post and one class at a time, for targets of 0 and 1."""

    def mean(rows: list[tuple[Numbers, Numbers, float]]) -> float:
        costs = []
        for scores, truth, weight in rows:
            positives, negatives = scores[truth == 1], scores[truth == 0]
            if not len(positives) or not len(negatives):
                continue
            high = np.log(np.exp(negatives).sum())  # temperature 1
            low = 4 * np.log(np.exp(-positives / 4).sum())
            costs.append(weight * np.log1p(np.exp(high + low)))
        return float(np.mean(costs))

    by_post = [(x[i], t[i], 1.0) for i in range(len(x))]
    by_class = [(x[:, j], t[:, j], weights[j]) for j in range(x.shape[1])]
    return mean(by_post) + mean(by_class)


TWO_WAY = LossSettings.model_validate({"name": "two_way"})


def test_the_two_way_loss_compares_within_posts_and_within_classes() -> None:
    """Posts without positives or negatives and posts that are masked take no part."""
    logits, targets = logits_and_targets()
    targets = targets.round()
    targets[4], targets[:, 2] = 1, 0
    mask = torch.tensor([True] * 7 + [False] * 2)
    logits[8] = float("inf")
    settings = TWO_WAY.model_copy(update={"class_balance": 0.9})
    loss = TaggingLoss(settings, torch.tensor([1, 2, 3, 400, 5]))
    loss_value = loss(logits, targets, mask).item()
    x, t = logits[:7].double().numpy(), targets[:7].double().numpy()
    assert loss_value == pytest.approx(two_way_in_numpy(x, t, loss.weights.numpy()), rel=1e-5)


def test_the_two_way_loss_of_soft_targets_lies_between_those_of_hard_ones() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5]])

    def cost(second: float) -> float:
        targets = torch.tensor([[1.0, second, 0.0]])
        return float(TaggingLoss(TWO_WAY, torch.ones(3))(logits, targets))

    assert cost(0.0) < cost(0.3) < cost(0.7) < cost(1.0)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_two_way_loss_of_nothing_to_compare_is_zero(value: float) -> None:
    logits: Any = torch.randn(3, 4, requires_grad=True)
    loss = TaggingLoss(TWO_WAY, torch.ones(4))(logits, torch.full((3, 4), value))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("name", [*SETTINGS, "two_way"])
@pytest.mark.parametrize("logit", [-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_finite_at_any_logit(name: str, logit: float, dtype: torch.dtype) -> None:
    """Far beyond where a sigmoid is 0 or 1, value and gradient are numbers, also in bfloat16."""
    settings = LossSettings.model_validate(SETTINGS.get(name, {"name": name}))
    logits = torch.full((2, 2), logit, dtype=dtype, requires_grad=True)
    loss = TaggingLoss(settings, torch.ones(2))(logits, torch.tensor([[0.0, 1.0], [0.0, 0.5]]))
    assert torch.isfinite(loss)
    assert loss.item() >= 0
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_class_weights_follow_the_effective_number() -> None:
    """The formula of the paper, mean 1; a class without positives is as one with one."""
    counts = np.array([1, 10, 1000, 0])
    effective = (1 - 0.99 ** np.maximum(counts, 1)) / (1 - 0.99)
    expected = 1 / effective
    expected /= expected.mean()
    weights = class_weights(torch.tensor(counts), 0.99)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert weights[0] == weights[3] > weights[1] > weights[2]
    assert torch.equal(class_weights(torch.tensor([1, 500]), 0.0), torch.ones(2)), "0 is off"
    assert torch.isfinite(class_weights(torch.tensor([1_000_000.0, 1.0]), 0.999999)).all()


def test_class_weights_weigh_a_class_column() -> None:
    logits, targets = logits_and_targets()
    positives = torch.tensor([1, 2, 3, 400, 5])
    settings = LossSettings.model_validate({"class_balance": 0.9})
    loss = TaggingLoss(settings, positives)(logits, targets).item()
    costs = numpy_costs(LossSettings(), logits.double().numpy(), targets.double().numpy())
    assert loss == pytest.approx((costs * class_weights(positives, 0.9).numpy()).mean(), rel=1e-5)


def test_masked_posts_cost_nothing_and_teach_nothing() -> None:
    """Their costs are left out, their gradient is zero, and infinities among them do no harm."""
    logits, targets = logits_and_targets()
    mask = torch.tensor([True, False] * 4 + [True])
    logits[1] = float("inf")
    logits.requires_grad_()
    loss = TaggingLoss(LossSettings(), torch.ones(5))(logits, targets, mask)
    rows = mask.numpy()
    x, t = logits.detach().double().numpy()[rows], targets.double().numpy()[rows]
    assert loss.item() == pytest.approx(numpy_costs(LossSettings(), x, t).sum() / 45, rel=1e-5)
    parts = [
        TaggingLoss(LossSettings(), torch.ones(5))(
            logits[i : i + 3], targets[i : i + 3], mask[i : i + 3]
        )
        for i in (0, 3, 6)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), loss)
    none = torch.zeros(9, dtype=torch.bool)
    assert TaggingLoss(LossSettings(), torch.ones(5))(logits, targets, none).item() == 0


def test_a_loss_that_does_not_exist_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"loss\.name.*'bce', 'focal', 'asymmetric' or 'two_way'"):
        validate(TrainSettings, {"loss": {"name": "hinge"}}, "test")


# Mixup


def batch() -> Batch:
    """Three posts of different lengths; the second has no sound, and garbage in its padding."""
    posts = [
        support.features("a", seed=1, lengths={"video": 2}),
        support.features("b", seed=2, lengths={"audio": 0, "video": 5}),
        support.features("c", seed=3),
    ]
    made = support.batch(posts, np.eye(3, support.CLASSES, dtype=np.float32))
    for modality, tokens in made.tokens.items():
        tokens[~made.masks[modality]] = float("nan")
    return made


def test_mixed_tokens_are_weighted_means_of_those_that_are_there() -> None:
    """Place by place in numpy: both there are blended, one alone is whole, none is padding."""
    whole, partners, shares = batch(), [1, 2, 0], [0.7, 0.25, 0.5]
    blended: Any = mixed_with(whole, torch.tensor(partners), torch.tensor(shares))
    for modality, tokens in whole.tokens.items():
        mask = whole.masks[modality].numpy()
        for i, (j, share) in enumerate(zip(partners, shares, strict=True)):
            for n in range(tokens.shape[1]):
                both = [(share, i), (1 - share, j)]
                parts = [(s, tokens[k, n].numpy()) for s, k in both if mask[k, n]]
                assert blended.masks[modality][i, n] == bool(parts)
                if parts:
                    expected = sum(s * row for s, row in parts) / sum(s for s, _ in parts)
                    np.testing.assert_allclose(blended.tokens[modality][i, n], expected, atol=1e-6)
    assert blended.targets[0].tolist() == pytest.approx([0.7, 0.3, 0, 0, 0, 0])
    assert blended.targets.sum(dim=1).tolist() == pytest.approx([1, 1, 1])


def test_shares_are_drawn_from_the_beta_distribution_by_the_seed() -> None:
    """The same seed mixes alike; over many draws mean and variance are those of Beta(α, α)."""
    whole = batch()
    draws = []
    for seed in (0, 0, *range(1, 400)):
        torch.manual_seed(seed)
        targets = mixed(whole, 0.5).targets
        assert targets is not None
        draws.append(targets)
    assert torch.equal(draws[0], draws[1])
    # Posts that got themselves as a partner show nothing of the share.
    shares = torch.stack(draws[1:])[:, range(3), range(3)].flatten()
    shares = shares[shares < 1]
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / 8, abs=0.02)


def test_mixup_is_for_training_only_and_its_loss_is_finite() -> None:
    """In evaluation the objective takes posts as they are; garbage in the padding stays there."""
    model = build_model(support.schema(), support.SMALL).eval()
    objective = Objective(model, TaggingLoss(LossSettings(), torch.ones(6)), mixup=0.5)
    plain = Objective(model, TaggingLoss(LossSettings(), torch.ones(6)))
    with torch.no_grad():
        assert objective(batch()) == plain(batch())
    model.train()
    assert torch.isfinite(objective(batch()))


def test_an_objective_wants_targets() -> None:
    model = build_model(support.schema(), support.SMALL)
    with pytest.raises(ValueError, match="needs targets"):
        Objective(model, TaggingLoss(LossSettings(), torch.ones(6)))(batch()._replace(targets=None))
