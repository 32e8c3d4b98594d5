"""Ensembles: the mean of their members, in one bundle."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import BundleError
from fusion.bundle import bundle
from fusion.bundle.about import Averaging
from fusion.bundle.bundle import Ensemble, averaged
from fusion.infer.inferer import Inferer
from tests.support.fusion import support
from tests.unit.fusion.test_bundle import write


def member(seed: int) -> Any:
    torch.manual_seed(seed)
    return support.model("token_transformer")


@pytest.mark.parametrize("averaging", ["probabilities", "logits"])
def test_an_ensemble_is_the_mean_of_its_members(averaging: Averaging, tmp_path: Path) -> None:
    """Served from one bundle it equals the members, each served alone and averaged by hand."""
    members = [member(seed) for seed in range(3)]
    version = write(tmp_path / "all", model=Ensemble(members, averaging))
    found = sorted(str(p.relative_to(tmp_path / "all")) for p in (tmp_path / "all").rglob("*.*"))
    assert found == [
        "bundle.yaml",
        "labels.json",
        "members/1.safetensors",
        "members/2.safetensors",
        "model.safetensors",
    ]
    features = [support.features(f"p{i}", seed=i, lengths={"ocr": i % 2}) for i in range(7)]
    each = []
    for i, one in enumerate(members):
        write(tmp_path / str(i), model=one)
        each.append(Inferer.load(tmp_path / str(i)).scores(features).astype(np.float64))
    if averaging == "probabilities":
        wanted = np.mean(each, axis=0)
    else:
        wanted = 1 / (1 + np.exp(-np.mean([np.log(s / (1 - s)) for s in each], axis=0)))
    inferer = Inferer.load(tmp_path / "all")
    np.testing.assert_allclose(inferer.scores(features), wanted, atol=2e-6)
    assert np.abs(each[0] - each[1]).max() > 1e-3
    assert inferer.version == version
    assert len(bundle.load_bundle(tmp_path / "all").members) == 3


def test_sure_members_do_not_tie() -> None:
    """Probabilities that float32 rounds to 1 keep their order in the ensemble's logits."""
    logits = torch.tensor([[40.0, 50.0, -60.0], [30.0, 60.0, -70.0]])  # (members, tags)
    found = averaged(logits, "probabilities")
    assert torch.isfinite(found).all()
    assert found[1] > found[0] > 0 > found[2]
    p = torch.sigmoid(torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64))
    wanted = torch.logit(p.mean(dim=0))
    torch.testing.assert_close(averaged(torch.logit(p), "probabilities"), wanted)


def test_the_version_knows_every_member(tmp_path: Path) -> None:
    versions = [
        write(tmp_path / str(seed), model=Ensemble([member(0), member(seed)])) for seed in (1, 2)
    ]
    assert versions[0][-8:] != versions[1][-8:]


def test_a_member_that_is_missing_or_another_is_refused(tmp_path: Path) -> None:
    """The file is named; a bundle never answers with a part of its members."""
    folder = tmp_path / "b"
    write(folder, model=Ensemble([member(0), member(1)]))
    other = folder / "members" / "1.safetensors"
    shutil.copy(folder / "model.safetensors", other)
    with pytest.raises(BundleError, match=r"members/1.safetensors: is truncated, or not"):
        bundle.load_bundle(folder)
    other.unlink()
    with pytest.raises(BundleError, match=r"members/1.safetensors: is missing"):
        bundle.load_bundle(folder)
