"""Sources of weights: hubs and their absence, files and their faults, seeds."""

import hashlib
import json
import shutil
import socket
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from common.errors import ConfigError
from extractors.models import weights
from extractors.models.weights import (
    parse_weights,
    reachable,
    read_state_dict,
    release_file,
    seeded,
    tensors_digest,
    weights_digest,
)
from tests.support.hub_server import hub_server
from tests.support.mistakes import one_line
from tests.support.processes import python
from tests.support.tiny_models import TINY_VIT, tiny_bert, tiny_timm_weights

_SCRIPT = """
import json, os, sys, time
from pathlib import Path
from tests.support.hub_server import hub_server

os.environ["HF_HOME"] = sys.argv[2]
with hub_server(Path(sys.argv[1])) as url:
    os.environ["HF_ENDPOINT"] = url  # is read when the hub's client is imported
    import timm
    from common.errors import ConfigError
    from config.features import ImageSettings, TextSettings
    from extractors.models.text import TextExtractor
    from extractors.models.visual import VisualExtractor
    from extractors.models.weights import seeded, tensors_digest

    def load(arch):
        extractor = (
            TextExtractor(TextSettings(arch=arch))
            if "/" in arch
            else VisualExtractor("image", ImageSettings(arch=arch, image_size=160))
        )
        try:
            extractor.load()
            return extractor.fingerprint
        except ConfigError as error:
            return str(error)

    first = {arch: load(arch) for arch in ("test_vit", "tiny/bert", "no/such")}
began = time.monotonic()
later = {arch: load(arch) for arch in ("test_vit", "tiny/bert", "test_resnet", "other/bert")}
seconds = time.monotonic() - began
with seeded(11):
    seed = tensors_digest(timm.create_model("test_vit", num_classes=0).state_dict())
print(json.dumps([first, later, seconds, seed]))
"""


def test_pretrained_and_seeded_weights_in_a_process_of_their_own(tmp_path: Path) -> None:
    """A hub gives pretrained weights once; without the hub its cache gives the same ones.

    What is not cached then fails within seconds in one line: what to put where. A seed gives the
    same tensors there as here, and leaves our randomness alone.
    """
    tiny_bert(tmp_path / "hub/tiny/bert")
    repository = tmp_path / "hub/timm/test_vit.r160_in1k"
    repository.mkdir(parents=True)
    file = tiny_timm_weights(tmp_path, TINY_VIT, num_classes=1000)
    shutil.copy(file, repository / "model.safetensors")
    result = python(
        *("-c", _SCRIPT, str(tmp_path / "hub"), str(tmp_path / "cache")),
        check=True,
        HF_HUB_DISABLE_XET="1",
        OMP_NUM_THREADS="1",
        no_proxy="127.0.0.1",
    )
    assert "Traceback" not in result.stderr
    first, later, seconds, seed = json.loads(result.stdout.splitlines()[-1])
    assert len(first["test_vit"]) == len(first["tiny/bert"]) == 32, first
    assert "features.text.arch: no/such cannot be loaded" in first["no/such"]
    assert {arch: later[arch] for arch in ("test_vit", "tiny/bert")} == {
        arch: first[arch] for arch in ("test_vit", "tiny/bert")
    }
    image, text = later["test_resnet"], later["other/bert"]
    for word in ("features.image.weights", "timm/test_resnet.r160_in1k/model.safetensors", "cache"):
        assert word in image
    for word in ("features.text.weights", "other/bert", "model.safetensors", "cache"):
        assert word in text
    assert "\n" not in image + text
    assert seconds < 30  # a hub's own client would try for half a minute, twice

    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    with seeded(11):
        model = timm.create_model(TINY_VIT, num_classes=0)
    assert torch.equal(torch.rand(1), expected)
    assert tensors_digest(model.state_dict()) == seed


def test_a_silent_host_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that accepts and never answers, as behind a firewall, costs the probe's time-out."""
    monkeypatch.setattr(weights, "_PROBE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        assert not reachable(f"http://127.0.0.1:{silent.getsockname()[1]}/file")
        assert time.monotonic() - began < 20


def test_released_files_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    content = b"weights"
    good = f"w-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    folder = tmp_path / "hub/x/y"
    folder.mkdir(parents=True)
    for name in (good, "w-00000000.pth"):
        (folder / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    with hub_server(tmp_path / "hub") as url:

        def get(name: str) -> Path:
            source, key = f"{url}/x/y/resolve/main/{name}", "features.audio.weights"
            return release_file(source, setting=key, repository="x/y")

        path = get(good)
        with pytest.raises(ConfigError, match=r"features.audio.weights: w-00000000.pth"):
            get("w-00000000.pth")
    assert path.read_bytes() == content
    assert get(good) == path
    placed = Path("workshop/pretrained/x--y")
    placed.mkdir(parents=True)
    shutil.copy(path, placed)
    assert get(good) == placed / good


def test_settings_are_parsed(tmp_path: Path) -> None:
    """pretrained, a path and random:SEED are told apart; anything else is one line."""
    assert parse_weights("pretrained", setting="s").pretrained
    assert parse_weights("random:7", setting="s").seed == 7
    assert parse_weights(str(tmp_path), setting="s").path == tmp_path
    for wrong in ("random:", "random:-1", "random:1.5", "pretraind"):
        with pytest.raises(ConfigError, match="s: "):
            parse_weights(wrong, setting="s")


def test_digests_tell_weights_apart(tmp_path: Path) -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    digest = tensors_digest(state)
    assert digest == tensors_digest(dict(reversed(state.items())))
    for other in (
        {**state, "a": state["a"].reshape(3, 2)},
        {**state, "b": torch.ones(2, dtype=torch.float16)},
        {"a": state["a"], "c": state["b"]},
        {**state, "a": state["a"] + 1e-6},
    ):
        assert tensors_digest(other) != digest
    path = tmp_path / "w.pth"
    torch.save(state, path)
    by_file = weights_digest(parse_weights(str(path), setting="s"), {})
    assert by_file == hashlib.sha256(path.read_bytes()).hexdigest()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(path.read_bytes())
    assert weights_digest(parse_weights(str(folder), setting="s"), {}) == by_file
    assert weights_digest(parse_weights("random:3", setting="s"), state) == "random:3"


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_arrays_of_any_age_are_read(tmp_path: Path, zipped: bool) -> None:
    """Arrays that numpy 1 pickled, in either file format of torch, as in torchvggish's PCA file."""
    path = tmp_path / "pca.pth"
    arrays = {"vectors": np.eye(3), "means": np.ones((3, 1), np.float32)}
    torch.save(arrays, path, _use_new_zipfile_serialization=zipped)
    old, new = b"numpy.core.multiarray", b"numpy._core.multiarray"
    if zipped:
        with zipfile.ZipFile(path) as file:
            parts = {name: file.read(name).replace(new, old) for name in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, content in parts.items():
                file.writestr(name, content)
    else:
        path.write_bytes(path.read_bytes().replace(new, old))
    assert old in b"".join(parts.values()) if zipped else old in path.read_bytes()
    state = read_state_dict(path, setting="s")
    for key, array in arrays.items():
        np.testing.assert_array_equal(state[key].numpy(), array)


def test_files_that_are_no_state_dict_are_refused(tmp_path: Path) -> None:
    """A pickled model (which could run code), damage, and other content: one line each."""
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": "text"}, tmp_path / "text.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    (tmp_path / "broken.pth").write_bytes(b"not a zip file")
    (tmp_path / "empty.pth").write_bytes(b"")
    for path in sorted(tmp_path.iterdir()):
        with one_line(ConfigError, match=rf"^features.x.weights: .*{path.name}"):
            read_state_dict(path, setting="features.x.weights")
