"""Features as batches, and the fusion models, each against plain numpy."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from common.errors import ConfigError, FeatureError
from common.post import Features, Stream
from config.fusion_models import MbtSettings, ModelSettings, NextVladSettings, TokenLimits
from config.train import LossSettings, OptimizerSettings
from fusion.models import MODELS, build_model
from fusion.models.base import Batch, FeatureManifest, InputSchema, ModalityDropout
from fusion.models.probe import Authors, logistic
from fusion.models.transformers import Block, positions
from fusion.models.vlad import MaskedBatchNorm, NeXtVLAD
from fusion.train.losses import Objective, TaggingLoss
from fusion.train.optimizer import parameter_groups
from tests.support.fusion import support
from tests.support.fusion.numpy_models import FORWARDS

NAMES = sorted(MODELS)
# The others leave out what is missing, or take its mean.
JOINT = [name for name in NAMES if name not in ("late", "linear_probe", "knn", "tag_text")]
POSTS = [
    support.features("a", seed=1),
    support.features("b", seed=2, lengths={"audio": 0, "video": 9, "text": 1}),
    support.features("c", seed=3, lengths={"video": 0, "image": 0, "ocr": 0, "text": 11}),
    support.features("d", seed=4, lengths=dict.fromkeys(support.MODALITIES, 0)),
]


def batch_of(posts: list[Features], *, targets: bool = False) -> Batch:
    return support.batch(posts, support.truth(len(posts)) if targets else None)


def lively(name: str, **changes: object) -> Any:
    """A small model with own heads, all of whose weights and statistics are far from their start.

    ``changes`` are of the model's own section.
    """
    torch.manual_seed(4)
    options = getattr(support.SMALL, name).model_copy(update=changes)
    settings = support.SMALL.model_copy(update={"name": name, "auxiliary": 0.5, name: options})
    model = build_model(support.schema(), settings).eval()
    if name == "knn":
        support.know(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        for part in model.modules():
            if isinstance(part, nn.BatchNorm1d):
                assert part.running_mean is not None
                assert part.running_var is not None
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
    return model


def logits(name: str, posts: list[Features], seed: int = 0) -> np.ndarray:
    torch.manual_seed(seed)
    with torch.inference_mode():
        values: np.ndarray = support.model(name)(batch_of(posts)).numpy()
    return values


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_in_the_padding_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = support.model(name)
    posts = [support.features("a", lengths={"audio": 2}), support.features("b")]
    batch = batch_of(posts)
    with torch.inference_mode():
        before = model(batch)
        batch.tokens["audio"][0, 2:] = float("nan")
        torch.testing.assert_close(model(batch), before)
        for modality in support.MODALITIES:
            masked = batch_of(posts)
            masked.masks[modality][1] = False
            masked.tokens[modality][1] = float("nan")
            lacking = support.features("b", lengths={modality: 0})
            missing = model(batch_of([posts[0], lacking]))
            torch.testing.assert_close(model(masked), missing, atol=1e-5, rtol=0)
            alone = model(batch_of([lacking]))  # a batch without a row of the modality
            torch.testing.assert_close(alone, missing[1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", JOINT)
def test_missing_vectors_learn(name: str) -> None:
    torch.manual_seed(0)
    model = support.model(name)
    model(batch_of([support.features(lengths={"ocr": 0})])).sum().backward()
    gradients: Any = {k.rpartition("missing.")[2]: p.grad for k, p in model.named_parameters()}
    assert gradients["ocr"].abs().sum() > 0
    assert gradients["video"] is None or not gradients["video"].any()


def test_the_order_of_frames_matters_and_that_of_images_does_not() -> None:
    """Motion is visible only in the order of frames; a post's pictures have none."""
    post = support.features(lengths={"video": 8, "image": 6})
    whole = logits("token_transformer", [post])
    cases: tuple[tuple[Stream, bool], ...] = (("video", True), ("audio", True), ("image", False))
    for modality, moved in cases:
        reverse = {**post.arrays, modality: post.arrays[modality][::-1].copy()}
        reversed_logits = logits("token_transformer", [Features("p", reverse, {})])
        assert (np.abs(reversed_logits - whole).max() > 1e-4) == moved, modality


def test_modality_dropout_always_leaves_one() -> None:
    drop = ModalityDropout(0.9).train()
    torch.manual_seed(0)
    has = torch.rand(500, 5) < 0.5
    has[:, 2] |= ~has.any(dim=1)
    masks = {m: has[:, i : i + 1].expand(-1, 3) for i, m in enumerate(support.MODALITIES)}
    stays = torch.stack([mask.any(dim=1) for mask in drop(masks).values()], dim=1)
    assert stays.any(dim=1).all()
    assert not (stays & ~has).any(), "nothing appears that was not there"
    several = has.sum(dim=1) == 5
    assert stays[several].float().mean() < 0.4
    assert all(torch.equal(a, masks[m]) for m, a in drop.eval()(masks).items())


def test_modality_dropout_hides_independently_and_about_as_often_as_asked() -> None:
    """At 0.15 a modality of a full post is hidden 15% of the time, less for the one kept."""
    drop = ModalityDropout(0.15).train()
    torch.manual_seed(1)
    masks = {m: torch.ones(20_000, 1, dtype=torch.bool) for m in support.MODALITIES}
    hidden = [1 - mask.float().mean().item() for mask in drop(masks).values()]
    assert all(abs(share - 0.15) < 0.01 for share in hidden)


@pytest.mark.parametrize("name", NAMES)
def test_an_untrained_model_predicts_the_frequencies(name: str) -> None:
    torch.manual_seed(0)
    model = support.model(name)
    frequencies = torch.linspace(0.02, 0.6, support.CLASSES)
    model.start_at(frequencies)
    with torch.inference_mode():
        predicted = torch.sigmoid(model(batch_of([support.features()])))[0]
    torch.testing.assert_close(predicted, frequencies, atol=0.1, rtol=0)


def test_positions_are_distinct_for_any_width() -> None:
    for width in (7, 32):
        places = positions(64, width)
        assert places.shape == (64, width)
        distances = torch.cdist(places, places) + torch.eye(64)
        assert distances.min() > 0.05


def test_heads_must_divide_the_width() -> None:
    options = support.SMALL.token_transformer.model_copy(update={"heads": 5})
    settings = support.SMALL.model_copy(update={"token_transformer": options})
    with pytest.raises(ConfigError, match=r"model.token_transformer.width: 32"):
        build_model(support.schema(), settings)


CASES: list[tuple[str, dict[str, object]]] = [(name, {}) for name in NAMES] + [
    ("concat_se", {"pooling": "nextvlad"}),
    ("linear_probe", {"alone": True}),
]


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_a_model_equals_a_numpy_forward(name: str, changes: dict[str, object]) -> None:
    model = lively(name, **changes)
    weights = {k: v.numpy().astype(np.float64) for k, v in model.state_dict().items()}
    with torch.inference_mode():
        said = model.outputs(batch_of(POSTS))
        np.testing.assert_array_equal(model(batch_of(POSTS)), said.logits)
    for i, post in enumerate(POSTS):
        logits, own = FORWARDS[name](weights, post)
        np.testing.assert_allclose(said.logits[i], logits, atol=2e-5, err_msg=post.post_id)
        assert set(own) == set(post.arrays) == {m for m in said.present if said.present[m][i]}
        said_own: Mapping[Any, torch.Tensor] = said.own
        for modality, expected in own.items():
            np.testing.assert_allclose(said_own[modality][i], expected, atol=2e-5, err_msg=modality)


@pytest.mark.parametrize("name", NAMES)
def test_in_training_too_a_post_is_blind_to_the_padding_of_others(name: str) -> None:
    posts, outcomes = POSTS[:3], []
    for padding in (0, 6):
        model = lively(name).train()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
            if isinstance(part, Block):
                part.rate = part.skip = 0.0
        model.drop.chance = 0.0
        batch = batch_of(posts)
        tokens = {m: nn.functional.pad(t, (0, 0, 0, padding)) for m, t in batch.tokens.items()}
        masks = {m: nn.functional.pad(t, (0, padding)) for m, t in batch.masks.items()}
        logits = model(batch._replace(tokens=tokens, masks=masks)).detach()
        outcomes.append([logits, *[b.clone() for b in model.buffers() if b.is_floating_point()]])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns_also_where_no_post_has_a_modality(name: str) -> None:
    """Each gets a gradient, though it may be zero: DDP stops at parameters without one."""
    model = lively(name).train()
    batch = batch_of([POSTS[2], POSTS[2]], targets=True)
    Objective(model, TaggingLoss(LossSettings(), torch.ones(6)), auxiliary=1.0)(batch).backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_own_heads_is_masked_post_by_post(name: str) -> None:
    """A modality's loss is that of the posts that have it: summed by hand, with no broadcasting."""
    model = lively(name)
    batch: Any = batch_of(POSTS, targets=True)
    loss = TaggingLoss(LossSettings(), torch.ones(6))
    with torch.no_grad():
        total = float(Objective(model, loss, auxiliary=0.5)(batch))
        said = model.outputs(batch)
    expected = float(binary_cross_entropy_with_logits(said.logits, batch.targets))
    for modality, logits in said.own.items():
        for i, post in enumerate(POSTS):
            if modality in post.arrays:
                own = float(binary_cross_entropy_with_logits(logits[i], batch.targets[i]))
                expected += 0.5 * own / len(POSTS)
    assert total == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_model_trains_in_bfloat16(name: str) -> None:
    """Under autocast loss and gradients are finite float32, near those of full precision."""
    batch, losses = batch_of(POSTS, targets=True), []
    for half in (False, True):
        model = lively(name)
        objective = Objective(model, TaggingLoss(LossSettings(), torch.ones(6)), auxiliary=1.0)
        model.train()
        model.drop.chance = 0.0
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = objective(batch)
        loss.backward()
        losses.append(loss.item())
        assert loss.dtype == torch.float32
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@pytest.mark.parametrize("name", JOINT)
def test_no_weight_for_own_heads_makes_none(name: str) -> None:
    """A model without them has the same weights by name as ever, and says nothing on its own."""
    plain = support.model(name)
    assert not [k for k in plain.state_dict() if k.startswith("own.")]
    assert plain.outputs(batch_of(POSTS[:1])).own == {}


def test_late_fusion_is_own_heads_that_learn_alone() -> None:
    """The loss of the mean reaches its weights only, so no head leans on another modality."""
    model = support.model("late").train()
    model(batch_of(POSTS)).sum().backward()
    assert [k for k, p in model.named_parameters() if p.grad is not None] == ["mixing"]
    assert model.own_weight == 1.0
    heads = model.outputs(batch_of([POSTS[0]])).own
    alone = support.features(
        "a", seed=1, lengths=dict.fromkeys(set(support.MODALITIES) - {"text"}, 0)
    )
    torch.testing.assert_close(model.eval()(batch_of([alone])), heads["text"])


def solved(
    posts: list[Features], targets: np.ndarray, penalty: float, **options: object
) -> tuple[Any, float]:
    settings = ModelSettings.model_validate(
        {"name": "linear_probe", "linear_probe": {"penalties": [100.0, penalty], **options}}
    )
    model = build_model(support.schema(), settings)
    solutions = model.solutions(
        [support.batch(posts[:9], targets[:9]), *rest(posts[9:], targets[9:])]
    )
    assert solutions is not None
    losses = list(solutions)
    assert len(losses) == 2
    return model.eval(), losses[-1]


def rest(posts: list[Features], targets: np.ndarray) -> list[Batch]:
    return [support.batch(posts, targets)] if posts else []


@pytest.mark.parametrize("count", [30, 300])
def test_a_start_pulls_weights_and_biases_to_itself(count: int) -> None:
    """The slope of loss and penalty is 0 at the solution; a class without posts stays there."""
    chance = np.random.default_rng(count)
    x, start = chance.normal(size=(count, 40)) / 6, chance.normal(size=(3, 41))
    y = (x @ chance.normal(size=(40, 3)) > 0.3) * [1.0, 1.0, 0.0]
    inputs, targets, first = (torch.tensor(each, dtype=torch.float32) for each in (x, y, start))
    [(weight, bias, _)] = logistic(inputs, targets, [0.5], (first[:, :40], first[:, 40]))
    wrong = 1 / (1 + np.exp(-(x @ weight.numpy().T + bias.numpy()))) - y
    slope = np.vstack([x.T @ wrong, wrong.sum(axis=0)]).T
    change = np.hstack([weight.numpy(), bias.numpy()[:, None]]) - start
    np.testing.assert_allclose((slope + 0.5 * change)[:2], 0, atol=0.02)
    assert np.abs(change[:2]).max() > 0.3
    np.testing.assert_allclose(change[2], 0, atol=1e-6)


@pytest.mark.parametrize(("count", "unit"), [(30, False), (300, False), (300, True)])
def test_a_linear_probe_is_logistic_regression(count: int, unit: bool) -> None:
    """As scikit-learn's, one for each class, with more elements than posts and with fewer."""
    gaps: list[dict[Any, int]] = [{}, {"audio": 0}, {"video": 0, "ocr": 0}]
    posts = [support.features(str(i), seed=i, lengths=gaps[i % 3]) for i in range(count)]
    targets = support.truth(count)
    model, loss = solved(posts, targets, 0.1, unit=unit)
    means: dict[Any, np.ndarray] = {}
    for m, dim in support.schema().dims.items():
        rows = [p.arrays[m].astype(float).mean(axis=0) if m in p.arrays else None for p in posts]
        if unit:
            rows = [None if row is None else row / np.linalg.norm(row) for row in rows]
        vectors = np.stack([row for row in rows if row is not None])
        length = np.sqrt((vectors**2).sum(axis=1).mean())
        away = [None if row is None else row - vectors.mean(axis=0) for row in rows]
        means[m] = np.stack(
            [
                np.zeros(dim) if row is None else row / (np.linalg.norm(row) if unit else length)
                for row in away
            ]
        )
    inputs = np.hstack(list(means.values()))
    with torch.inference_mode():
        logits = model(support.batch(posts)).numpy()
    for k in range(support.CLASSES):
        theirs = LogisticRegression(C=10, tol=1e-8, max_iter=5000).fit(inputs, targets[:, k])
        np.testing.assert_allclose(logits[:, k], theirs.decision_function(inputs), atol=0.03)
    expected = binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(targets))
    assert loss == pytest.approx(float(expected), abs=1e-4)


def test_each_modality_has_a_probe_that_its_own_posts_have_taught() -> None:
    """As if no post had another modality; the mean of its score and the joint one counts."""
    gaps: list[dict[Any, int]] = [{}, {"audio": 0}, {"video": 0, "ocr": 0}]
    posts = [support.features(str(i), seed=i, lengths=gaps[i % 3]) for i in range(60)]
    targets = support.truth(60)
    model, _ = solved(posts, targets, 0.1, alone=True)
    assert torch.is_grad_enabled()
    joint, _ = solved(posts, targets, 0.1)
    for m in model.streams:
        have = [i for i, post in enumerate(posts) if m in post.arrays]
        one = [Features(posts[i].post_id, {m: posts[i].arrays[m]}, {}) for i in have]
        alone, _ = solved(one, targets[have], 0.1)
        batch = support.batch(one)
        with torch.inference_mode():
            mean = (joint(batch).sigmoid() + alone(batch).sigmoid()) / 2
            torch.testing.assert_close(model(batch).sigmoid(), mean, atol=1e-3, rtol=0)


def test_a_calibrated_probe_suits_authors_who_were_left_out() -> None:
    """As scikit-learn's models without a quarter of the authors, and scipy's minimum, have it."""
    chance = np.random.default_rng(5)
    names = [f"author {i}" for i in chance.integers(0, 9, 150)] + [""] * 10
    x = chance.normal(size=(160, 12)) / 3
    y = (x @ chance.normal(size=(12, 3)) + chance.normal(size=(160, 3)) > 0).astype(np.float32)
    inputs, targets, authors = torch.tensor(x).float(), torch.tensor(y), Authors.of(names)
    [(weight, bias, loss)] = logistic(inputs, targets, [0.5])
    [(calibrated, shifted, same)] = logistic(inputs, targets, [0.5], authors=authors)
    assert loss == pytest.approx(same, abs=1e-6)
    part, logits = authors.part.numpy(), np.zeros_like(y)
    for k, i in itertools.product(range(3), range(4)):
        theirs = LogisticRegression(C=2, tol=1e-8).fit(x[part != i], y[part != i, k])
        logits[part == i, k] = theirs.decision_function(x[part == i])

    def total(values: np.ndarray) -> float:
        scale, shift, own = values[0], values[1], values[2:].reshape(2, 3)
        z = (scale + own[0]) * logits + shift + own[1]
        wrong = (np.logaddexp(0, z) - y * z) * authors.weight.numpy()[:, None]
        return float(wrong.sum() + 3 * (own**2).sum())

    best = minimize(total, np.array([1.0] + [0.0] * 7)).x
    scale, shift = best[0] + best[2:5], best[1] + best[5:]
    np.testing.assert_allclose(calibrated / weight, np.tile(scale, (12, 1)).T, atol=0.02)
    np.testing.assert_allclose(shifted, scale * bias.numpy() + shift, atol=0.02)


def test_authors_are_dealt_whole_and_busy_ones_count_less() -> None:
    """A post without author is one of its own; three authors cannot be left out in four parts."""
    authors = Authors.of(["a"] * 4 + ["b"] * 4 + ["c"] * 3 + ["d"] + ["", ""] + ["e"])
    assert sorted(np.bincount(authors.part).tolist()) == [3, 4, 4, 4]
    assert len(set(authors.part[:4].tolist())) == len(set(authors.part[8:11].tolist())) == 1
    assert float(authors.weight.mean()) == pytest.approx(1)
    assert float(authors.weight[12] / authors.weight[0]) == pytest.approx(2)
    with pytest.raises(ConfigError, match=r"model\.linear_probe\.calibrate: .* 3 authors"):
        Authors.of(["a", "b", "b", "c"])


def test_neighbours_are_chosen_by_other_posts_than_the_post_itself() -> None:
    """Tags that follow nothing are never found by looking at oneself; tags of a kind are."""
    options = {"knn": {"neighbours": [1, 5], "temperatures": [0.01, 0.3]}, "name": "knn"}
    settings = ModelSettings.model_validate(options)
    kinds = [support.features(str(k), seed=k) for k in range(6)]
    chance, posts = np.random.default_rng(3), []
    for i in range(90):
        arrays = {
            m: (a + chance.normal(0, 0.3, a.shape)).astype(np.float16)
            for m, a in kinds[i % 6].arrays.items()
            if m != "text" or i % 7 == 3
        }
        posts.append(Features(str(i), arrays, {}))
    of_kind = np.eye(6, dtype=np.float32)[np.arange(90) % 6]
    losses = []
    for targets in (of_kind, support.truth(90)):
        model = build_model(support.schema(), settings).eval()
        solutions: Any = model.solutions([support.batch(posts[:50], targets[:50])])
        losses += list(solutions)
        with torch.inference_mode():
            scores = model(support.batch(posts[50:])).sigmoid().numpy()
        if targets is of_kind:
            assert (scores.argmax(axis=1) == targets[50:].argmax(axis=1)).all()
    assert losses[0] < 0.1
    assert losses[1] > 0.5, "by themselves posts would know all"


@pytest.mark.parametrize("name", NAMES)
def test_groups_cover_every_parameter_once_at_the_rate_of_its_stage(name: str) -> None:
    """Rates of groups and layers: counted by parameter, and each as its stage says."""
    model = lively(name)
    settings = OptimizerSettings.model_validate(
        {
            "learning_rate": 1e-3,
            "group_rates": {"modality": 1e-4, "head": 1e-2},
            "layer_decay": 0.5,
            "weight_decay": 0.1,
        }
    )
    groups = parameter_groups(model, settings)
    placed = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    names = dict(model.named_parameters())
    assert set(placed) == {id(p) for p in names.values()}
    stages = model.stages()
    rates = {"modality": 1e-4, "fusion": 1e-3, "head": 1e-2}
    for height, stage in enumerate(reversed(stages)):
        within = [k for k in names if any(k == n or k.startswith(f"{n}.") for n in stage.names)]
        assert within, stage
        for key in within:
            group = placed[id(names[key])]
            assert group["lr"] == pytest.approx(rates[stage.group] * 0.5**height), key
            plain = names[key].ndim <= 1 or key in ("bottlenecks", "mixing")
            assert group["weight_decay"] == (0.0 if plain else 0.1), key
    assert stages[-1].group == "head"
    assert "own" in stages[-1].names


def test_a_parameter_without_a_stage_is_refused() -> None:
    model = support.model("gmu")
    model.forgotten = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"forgotten\.weight is in 0 stages"):
        parameter_groups(model, OptimizerSettings())


# Parts


def test_nextvlad_rounds_its_width_up_to_the_groups() -> None:
    """λN need not divide by G; sound has half the clusters and groups."""
    pool = NeXtVLAD(10, NextVladSettings(clusters=6, groups=8), share=1)
    assert pool.expand.out_features == 24
    assert pool.width == 6 * 3
    half = NeXtVLAD(10, NextVladSettings(clusters=6, groups=8), share=2)
    assert (half.clusters, half.groups) == (3, 4)


def test_masked_batch_normalisation_learns_from_what_is_there() -> None:
    torch.manual_seed(0)
    rows, mask = torch.randn(4, 5, 3) * 2 + 1, torch.rand(4, 5) < 0.6
    masked, plain = MaskedBatchNorm(3).train(), nn.BatchNorm1d(3).train()
    normalised = masked(rows, mask)
    torch.testing.assert_close(normalised[mask], plain(rows[mask]))
    assert not normalised[~mask].any()
    torch.testing.assert_close(masked.running_mean, plain.running_mean)
    torch.testing.assert_close(masked.running_var, plain.running_var)
    torch.testing.assert_close(masked.eval()(rows)[mask], plain.eval()(rows[mask]))
    before: Any = masked.train().running_mean
    means = before.clone()
    one = torch.zeros(4, 5, dtype=torch.bool)
    one[0, 0] = True
    assert torch.isfinite(masked(rows, one)).all(), "one row has no variance"
    torch.testing.assert_close(masked.running_mean, means)


def test_stochastic_depth_skips_posts_as_often_as_asked_and_keeps_the_mean() -> None:
    """A skipped branch is zero, a kept one is scaled; in evaluation nothing is skipped."""
    torch.manual_seed(0)
    block = Block(8, 2, 0.0, skip=0.25).train()
    branch = torch.ones(8000, 1, 8)
    factors = block._sometimes(branch)[:, 0, 0]
    assert sorted(set(factors.tolist())) == pytest.approx([0, 4 / 3])
    assert (factors == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(block.eval()._sometimes(branch), branch)
    settings = support.SMALL.model_copy(update={"name": "mbt"})
    built: Any = build_model(support.schema(), settings)
    assert [b["video"].skip for b in built.blocks] == pytest.approx([0, 0.05, 0.1])


def test_the_bottleneck_is_the_only_way_between_modalities() -> None:
    """With nothing shared in the exchange, a modality's stream would not know of the others."""
    model = lively("mbt", bottlenecks=1)
    batch = batch_of([POSTS[0]])
    swapped = {**batch.tokens, "text": batch_of([support.features("a", seed=9)]).tokens["text"]}
    video_tokens = []
    for tokens in (batch.tokens, swapped):
        seen: list[torch.Tensor] = []
        hook = model.norms["video"].register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(out)
        )
        with torch.inference_mode():
            model(batch._replace(tokens=tokens))
        hook.remove()
        video_tokens.append(seen[0])
    assert (video_tokens[0] - video_tokens[1]).abs().max() > 1e-5, (
        "text reaches video through one token"
    )
    first = MbtSettings(layers=2, fusion_layers=1)
    assert first.layers - first.fusion_layers == 1
    with pytest.raises(ValueError, match="fusion_layers 3 are more than layers"):
        MbtSettings(layers=2, fusion_layers=3)


def test_old_settings_still_describe_old_models() -> None:
    """A bundle of before names two sections; its concat model has the weights it always had."""
    old = {"name": "concat_se", "concat_se": {"modality_width": 16, "width": 32}}
    model = build_model(support.schema(), ModelSettings.model_validate(old))
    parts = {key.split(".")[0] for key in model.state_dict()}
    assert parts == {"norms", "projections", "missing", "join", "gate", "classify"}


def test_images_join_the_frames() -> None:
    """The model sees one modality: frames first, then images, in order; or images alone."""
    for frames in (3, 0):
        post = support.features(lengths={"video": frames, "image": 2})
        joined = support.schema(image_as_frames=True).arrays(post)
        assert "image" not in joined
        parts = [post.arrays[m] for m in ("video", "image") if m in post.arrays]
        np.testing.assert_array_equal(joined["video"], np.concatenate(parts))


def test_images_of_another_length_cannot_be_frames() -> None:
    """Features of two extractors with other dims cannot stand in one sequence."""
    manifest = support.manifest(dims={"video": 12, "image": 16}, image_as_frames=True)
    with pytest.raises(ConfigError, match="length 16, of frames 12"):
        InputSchema.of(manifest, TokenLimits(), 3)


def test_long_texts_are_cut_and_long_videos_thinned() -> None:
    """A text keeps its beginning; a video keeps frames from its whole length, in order."""
    limits = TokenLimits(video=4, text=4)
    manifest = FeatureManifest({"video": 1, "text": 1}, {"video": "v", "text": "t"})
    schema = InputSchema.of(manifest, limits, 2)
    count = np.arange(16, dtype=np.float16)[:, None]
    arrays = schema.arrays(Features("p", {"video": count, "text": count}, {}))
    assert arrays["text"].ravel().tolist() == [0, 1, 2, 3]
    assert arrays["video"].ravel().tolist() == [2, 6, 10, 14]


def test_features_of_another_shape_are_refused_by_name() -> None:
    wrong = Features("p7", {"audio": np.zeros((2, 5), np.float16)}, {})
    with pytest.raises(FeatureError, match=r"p7: audio features are \(2, 5\).*\(n, 6\)"):
        support.schema().arrays(wrong)


def test_modalities_can_be_left_out_or_unknown() -> None:
    arrays = support.schema().arrays(support.features(), frozenset({"audio"}))
    assert set(arrays) == {"video", "image", "text", "ocr"}
    only_text = InputSchema.of(FeatureManifest({"text": 10}, {"text": "t"}), TokenLimits(), 2)
    assert set(only_text.arrays(support.features())) == {"text"}


def test_a_batch_is_padded_and_masked() -> None:
    posts = [support.features("a", seed=1), support.features("b", seed=2, lengths={"video": 2})]
    targets = np.eye(2, support.CLASSES, dtype=np.float32)
    batch: Any = support.batch(posts, targets)
    assert batch.post_ids == ("a", "b")
    assert batch.tokens["video"].shape == (2, 5, 12)
    assert batch.tokens["video"].dtype == torch.float32
    assert batch.masks["video"].sum(dim=1).tolist() == [5, 2]
    assert not batch.tokens["video"][1, 2:].any()
    np.testing.assert_array_equal(batch.tokens["video"][1, :2].numpy(), posts[1].arrays["video"])
    np.testing.assert_array_equal(batch.targets.numpy(), targets)


def test_a_modality_that_no_post_of_a_batch_has() -> None:
    """Its tokens have length 0, and nothing fails."""
    batch = support.batch([support.features(lengths={"ocr": 0})])
    assert batch.tokens["ocr"].shape == (1, 0, 10)
    assert batch.masks["ocr"].shape == (1, 0)
    assert batch.targets is None
