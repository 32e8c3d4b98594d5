"""Stages of the demo: skipped, failing and serving, as its end-to-end run does not show them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import requests

from config.labels import LabelMap
from config.load import load_settings
from demo.backbones import complete_preset, train_backbone
from demo.layout import Layout, Sizes
from demo.online import media_server
from demo.stages import run_stage
from extractors.learned import learned_from
from extractors.models.text import TextExtractor

ROOT = Path(__file__).resolve().parents[2]


def test_a_stage_is_done_only_with_its_inputs_and_outputs(tmp_path: Path) -> None:
    """Other inputs or a missing output: the stage runs again."""
    ran: list[int] = []
    output, stamp = tmp_path / "output", tmp_path / "stage"

    def work(number: int) -> None:
        assert not stamp.exists(), "killed now, the stage is not done"
        ran.append(number)
        output.touch()

    for number, inputs in enumerate(("a", "a", "b", "b", "b")):
        run_stage(stamp, inputs, (output,), partial(work, number))
        if number == 3:
            output.unlink()
    assert ran == [0, 2, 4]


def test_media_are_served_on_loopback_and_nothing_else(tmp_path: Path) -> None:
    """A file comes as it is; folders are not listed; afterwards the port is closed."""
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.bin").write_bytes(b"abc")
    with media_server(tmp_path) as url:
        assert requests.get(f"{url}/media/a.bin", timeout=5).content == b"abc"
        assert requests.get(f"{url}/media/", timeout=5).status_code == 404
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/media/a.bin", timeout=5)


def test_the_text_backbone_is_a_folder_that_the_extractor_loads(tmp_path: Path) -> None:
    """Words that were seen have a token each, Chinese has one a character, no word is lost."""
    posts = [
        {"post_id": str(i), "labels": ["travel"], "text": text, "ocr": "SALE"}
        for i, text in enumerate(("the hotel by the sea", "老城旁边的酒店", "A plain day."))
    ]
    layout = Layout(tmp_path)
    layout.read("train").parent.mkdir(parents=True)
    layout.read("train").write_text(json.dumps(posts), encoding="utf-8")
    folder = tmp_path / "text"
    settings = load_settings(
        ROOT / "config/demo.yaml",
        [f"features.text.arch={folder}", f"features.text.weights={folder}"],
    )
    labels = LabelMap.load(ROOT / "config/idx2name_cls24.json")
    train_backbone("text", layout, settings, Sizes(), labels)
    extractor = TextExtractor(settings.features.text)
    extractor.load()
    ids = [extractor.preprocess(text) for text in ("The hotel", "酒店", "sale", "sdlx")]
    unknown = 1
    assert [len(i) for i in ids] == [4, 4, 3, 6]
    assert all(unknown not in i for i in ids)
    assert extractor.forward(ids)[0].shape == (4, extractor.dim)
    extractor.close()
    assert [str(i) in learned_from(settings.features)["text"] for i in range(4)] == [1, 1, 1, 0]


def test_sound_of_the_demo_completes_the_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its network goes where `small` looks for one, and never replaces another."""
    monkeypatch.chdir(tmp_path)
    ours, place = tmp_path / "audio.safetensors", Path("workshop/pretrained/audio.safetensors")
    for content in (b"first", b"second"):
        ours.write_bytes(content)
        complete_preset(ours)
        assert place.read_bytes() == b"first"
