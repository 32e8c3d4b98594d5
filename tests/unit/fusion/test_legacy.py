"""Legacy ``.pth``: read safely by default, whole models when allowed, and written."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from common.errors import ConfigError
from common.pth import load_weights
from extractors.models.weights import read_state_dict
from fusion.bundle.bundle import load_bundle
from fusion.bundle.legacy import fit, resolve_model, save_legacy, with_weights
from tests.support.fusion import support
from tests.support.mistakes import one_line
from tests.support.scripts import infer_rig as rig


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "executed"))


@pytest.fixture
def bomb(tmp_path: Path) -> tuple[Path, Path]:
    """A ``.pth`` file, and the file that it would write."""
    torch.save({"state_dict": Bomb(tmp_path / "written")}, tmp_path / "bomb.pth")
    return tmp_path / "bomb.pth", tmp_path / "written"


def test_nothing_in_a_file_is_executed_by_default(bomb: tuple[Path, Path]) -> None:
    """Neither for fusion nor for backbones; the line says why, and which key would allow it."""
    path, written = bomb
    with one_line(ConfigError, match=r"would run the code .* set allow_pickle: true"):
        load_weights(path)
    with pytest.raises(ConfigError, match=r"set features\.image\.allow_pickle: true"):
        read_state_dict(path, setting="features.image.weights")
    assert not written.exists()
    # The test's own test: the file is what it seems to be.
    with pytest.raises(ConfigError, match=r"holds no state dict|is not a plain state dict"):
        load_weights(path, allow_pickle=True)
    assert written.read_text() == "executed"


def test_no_command_executes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--best_model`` of infer_net.py and ``--resume`` of train_net.py."""
    import train_net

    folder = rig.make(tmp_path, posts=4)
    torch.save(Bomb(folder / "written"), folder / "bomb.pth")
    assert rig.infer(folder, "--best_model", str(folder / "bomb.pth")) == 2
    assert "set allow_pickle: true" in capsys.readouterr().err
    (folder / "train.yaml").write_text(support.train_settings(folder).model_dump_json())
    support.write_posts(folder, "train", 8, 1)
    support.write_posts(folder, "valid", 8, 2)
    options = ["--model_config", str(folder / "train.yaml"), "--resume", str(folder / "bomb.pth")]
    assert train_net.main(options) == 2
    assert "set trainer.allow_pickle: true" in capsys.readouterr().err
    assert not (folder / "written").exists()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"net": {f"module.{key}": value for key, value in state.items()}},
    ],
    ids=["plain", "state_dict", "model", "both", "module", "net module"],
)
def test_wrappers_are_taken_off(wrap: Any, tmp_path: Path) -> None:
    state = {"a.weight": torch.arange(4.0), "b": torch.ones(2, 2)}
    torch.save(wrap(state), tmp_path / "w.pth")
    loaded = load_weights(tmp_path / "w.pth")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_one_module_called_module_keeps_its_name(tmp_path: Path) -> None:
    """Only a prefix that every name has is DataParallel's."""
    state = {"module.a": torch.ones(1), "head.b": torch.ones(1)}
    torch.save(state, tmp_path / "w.pth")
    assert load_weights(tmp_path / "w.pth").keys() == state.keys()


def test_a_whole_model_is_read_if_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``allow_pickle: true`` in the config, DataParallel or not: the scores of that model."""
    folder = rig.make(tmp_path, posts=5)
    rig.write_bundle(folder / "best", seed=5)
    model = load_bundle(folder / "best").model
    output = folder / "t.jsonl"
    options = ["--best_model", str(folder / "best"), "--output", str(output)]
    assert rig.infer(folder, *options) == 0
    scores = [line["scores"] for line in rig.lines(output)]
    for whole in (model, torch.nn.DataParallel(model), {"model": model}):
        torch.save(whole, folder / "whole.pth")
        options = ["--best_model", str(folder / "whole.pth"), "--output", str(output)]
        assert rig.infer(folder, *options) == 2
        assert "set allow_pickle: true" in capsys.readouterr().err
        assert rig.infer(folder, *options, "--set", "allow_pickle=true") == 0
        assert [line["scores"] for line in rig.lines(output)] == scores


def test_a_model_without_its_code_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = ModuleType("elsewhere")
    net = type("Net", (torch.nn.Linear,), {"__module__": "elsewhere"})
    monkeypatch.setattr(elsewhere, "Net", net, raising=False)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "elsewhere", elsewhere)
        torch.save(net(2, 2), tmp_path / "net.pth")
    with pytest.raises(
        ConfigError, match=r"code of its pickled model cannot be imported .*elsewhere"
    ):
        load_weights(tmp_path / "net.pth", allow_pickle=True)


def test_what_is_written_is_read_by_plain_torch(tmp_path: Path) -> None:
    """Both ways of the original: torch.load, and torch.load with load_state_dict."""
    model = support.model("gmu")
    save_legacy(model, tmp_path / "whole.pth", whole=True)
    save_legacy(model, tmp_path / "state.pth", whole=False)
    whole = torch.load(tmp_path / "whole.pth", weights_only=False)
    other = support.model("gmu")
    other.load_state_dict(torch.load(tmp_path / "state.pth"))
    for read in (whole, other):
        for key, value in model.state_dict().items():
            assert torch.equal(read.state_dict()[key], value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read as weights"),
        (b"not a file of torch", "more than tensors|cannot be read as weights"),
        (b"PK\x03\x04 half a zip file", "cannot be read as weights"),
        (b"\x80\x02.", "cannot be read as weights"),  # an IndexError
        (b"\x80\x02J\x01", "cannot be read as weights"),  # a struct.error
    ],
)
def test_a_broken_file_is_one_line(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    (tmp_path / "w.safetensors").write_bytes(content)
    for name, words in (("w.pth", says), ("w.safetensors", "cannot be read as weights")):
        with one_line(ConfigError, match=rf"{name}.*({words})"):
            load_weights(tmp_path / name)
    with pytest.raises(ConfigError, match="no such file"):
        load_weights(tmp_path / "none.pth")


def test_a_file_with_a_damaged_name_is_one_line(tmp_path: Path) -> None:
    """An assertion of torch tells of a missing storage; here it is an error like any other."""
    path = tmp_path / "w.pth"
    storage = torch.ones(3)
    torch.save({"a": storage}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    at = content.rindex(str(storage.untyped_storage()._cdata).encode())
    path.write_bytes(content[:at] + b"?" + content[at + 1 :])
    with pytest.raises(ConfigError, match=r"w\.pth: cannot be read as weights") as caught:
        load_weights(path)
    assert isinstance(caught.value.__cause__, AssertionError)


def test_other_weights_in_a_bundle(tmp_path: Path) -> None:
    """The bundle made of them is whole, differs in weights and version, and is the same again."""
    rig.write_bundle(tmp_path / "old", members=2)
    rig.write_bundle(tmp_path / "new", members=2, seed=4)
    new = load_bundle(tmp_path / "new")
    torch.save(new.model.state_dict(), tmp_path / "both.pth")
    torch.save(new.members[0].state_dict(), tmp_path / "one.pth")
    versions = [
        with_weights(tmp_path / "old", tmp_path / "both.pth", tmp_path / name) for name in "ab"
    ]
    assert versions[0] == versions[1] != load_bundle(tmp_path / "old").version
    made = load_bundle(tmp_path / "a")
    assert len(made.members) == 2
    for key, value in new.model.state_dict().items():
        assert torch.equal(made.model.state_dict()[key], value)
    with_weights(tmp_path / "old", tmp_path / "one.pth", tmp_path / "c")
    assert len(load_bundle(tmp_path / "c").members) == 1
    with_weights(tmp_path / "c", tmp_path / "one.pth", tmp_path / "d")
    with pytest.raises(ConfigError, match=r"holds 2 members, bundle .*c 1"):
        with_weights(tmp_path / "c", tmp_path / "both.pth", tmp_path / "e")


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    """One line with the first difference; heads for training only do not matter."""
    rig.write_bundle(tmp_path / "bundle")
    torch.save(support.model("concat_mlp").state_dict(), tmp_path / "w.pth")
    with one_line(ConfigError, match=r"w\.pth: does not fit the architecture"):
        resolve_model(tmp_path / "w.pth", tmp_path / "bundle", tmp_path / "x", allow_pickle=False)
    extra = {**support.model("gmu").state_dict(), "own.video.weight": torch.ones(1)}
    fit(support.model("gmu"), extra, tmp_path / "w.pth")
