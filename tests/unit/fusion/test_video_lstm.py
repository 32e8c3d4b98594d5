"""Training of the attention LSTM: what is saved, and a post's score."""

import errno
import os
from pathlib import Path

import pytest
import torch

from config.features import LstmSizes, VideoLstmSettings
from extractors.models.visual import AttentionLstm, VideoLstm
from fusion.backbones.media import STREAM
from fusion.backbones.model import LstmTagger, save_weights
from fusion.models.base import Batch

SIZES = LstmSizes(projection=6, hidden=5, join=9, width=7)
DIM = 11


def test_saved_weights_load_in_the_extractor(tmp_path: Path) -> None:
    """The same weights give the same bytes, and the extractor takes all of them."""
    torch.manual_seed(1)
    model = AttentionLstm(DIM, SIZES)
    out = tmp_path / "weights" / "video_lstm.safetensors"
    save_weights(model, out, "lstm", {"frames_dim": "11"})
    first = out.read_bytes()
    save_weights(model, out, "lstm", {"frames_dim": "11"})
    assert out.read_bytes() == first
    served = VideoLstm(
        VideoLstmSettings(**SIZES.model_dump(), weights=str(out), precision="fp32"), "cpu"
    )
    served.load_for(DIM, "frames")
    state = served.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_weights_that_do_not_reach_the_disk_are_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are on the disk before they get their name; those from before stay."""
    out = tmp_path / "weights" / "x.safetensors"
    model = torch.nn.Linear(3, 2)
    save_weights(model, out, "backbone", {"arch": "linear"})
    before = out.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_weights(model, out, "backbone", {"arch": "linear"})
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_training_has_dropout_and_serving_has_none() -> None:
    model = AttentionLstm(DIM, SIZES)
    frames = torch.randn(2, 5, DIM)
    assert not torch.equal(model(frames), model(frames))
    model.eval()
    assert torch.equal(model(frames), model(frames))


def test_a_post_has_the_scores_of_its_best_video() -> None:
    """Padding counts for nothing; the highest score of each tag is the post's."""
    torch.manual_seed(0)
    tagger = LstmTagger(DIM, SIZES, 4).eval()
    videos = torch.randn(3, 6, DIM)
    tokens = torch.stack([torch.stack([videos[0], videos[1]]), torch.stack([videos[2], videos[0]])])
    mask = torch.tensor([[True, True], [True, False]])
    found = tagger(Batch(("a", "b"), {STREAM: tokens}, {STREAM: mask}))
    scores = tagger.classify(tagger.lstm(videos))  # (videos, classes)
    torch.testing.assert_close(found[0], scores[:2].amax(dim=0))
    torch.testing.assert_close(found[1], scores[2])


def test_a_post_without_video_has_the_scores_of_the_frequencies() -> None:
    """Nothing to see is no error: the classifier's bias speaks."""
    tagger = LstmTagger(DIM, SIZES, 2).eval()
    tagger.start_at(torch.tensor([0.5, 0.1]))
    tokens = torch.randn(2, 1, 6, DIM)
    mask = torch.tensor([[True], [False]])
    found = tagger(Batch(("a", "b"), {STREAM: tokens}, {STREAM: mask}))
    torch.testing.assert_close(found[1].sigmoid(), torch.tensor([0.5, 0.1]))
