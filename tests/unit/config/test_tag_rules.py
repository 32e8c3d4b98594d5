"""The file of `fusion.tags`: tags hidden, renamed and mapped, and the line for each mistake."""

from pathlib import Path

import pytest

from common.errors import ConfigError
from config.labels import LabelMap
from config.settings import FusionSettings, InferSettings
from config.tag_rules import TagRules
from tests.support.mistakes import one_line

LABELS = LabelMap(("cat", "dog", "sea", "animals"))


def read(folder: Path, text: str) -> TagRules:
    path = folder / "tags.yaml"
    path.write_text(text, encoding="utf-8")
    return TagRules.read(FusionSettings(tags=path))


@pytest.mark.parametrize(
    ("text", "served"),
    [
        ("", [(0, "cat", (0,)), (1, "dog", (1,)), (2, "sea", (2,)), (3, "animals", (3,))]),
        ("hide: [cat, animals]", [(1, "dog", (1,)), (2, "sea", (2,))]),
        ("hide: sea\nrename: {dog: 狗}", [(0, "cat", (0,)), (1, "狗", (1,)), (3, "animals", (3,))]),
        # A name that the bundle has too: the tag that always had it gives the ID.
        ("rename: {cat: animals, dog: animals}", [(3, "animals", (0, 1, 3)), (2, "sea", (2,))]),
        ("hide: animals\nmap: {animals: [dog, cat]}", [(0, "animals", (0, 1)), (2, "sea", (2,))]),
        (
            "map: {Pets: {id: p-7, tags: [cat, dog]}, Sea: {id: 40, tags: sea}}",
            [("p-7", "Pets", (0, 1)), (40, "Sea", (2,)), (3, "animals", (3,))],
        ),
        (
            "rename: {cat: dog, dog: cat}",
            [(0, "dog", (0,)), (1, "cat", (1,)), (2, "sea", (2,)), (3, "animals", (3,))],
        ),
    ],
)
def test_tags_that_posts_can_be_given(
    tmp_path: Path, text: str, served: list[tuple[int | str, str, tuple[int, ...]]]
) -> None:
    tags = read(tmp_path, text).served(LABELS)
    assert [(tag.id, tag.name, tag.classes) for tag in tags] == served


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("hide: [cta]", "hide: the bundle has no tag 'cta'; did you mean 'cat'?"),
        ("map: {A: [dgo]}", "map.A: the bundle has no tag 'dgo'; did you mean 'dog'?"),
        ("hidden: [cat]", "hidden: unknown key; did you mean 'hide'?"),
        ("hide: [2024]", "hide.0: must be a tag's name as text, in quotes (got 2024)"),
        ("hide: {cat: dog}", "hide: must be a list of the bundle's tags"),
        ("rename: {dog: ' '}", "rename.dog: must not be empty"),
        ("hide: cat\nrename: {cat: dog}", "hide, rename: both name 'cat'"),
        ("map: {A: {id: true, tags: [cat]}}", "map.A.id: must be a whole number or text"),
        ("map: {A: {id: 3, tags: cat}}", "'A' and 'animals' would both have the id 3"),
        ("map: {A: 3}", "map.A.tags: must be a list of the bundle's tags"),
        ("hide: [cat, dog, sea, animals]", "hide: names every tag of the bundle"),
        ("- cat", "must hold keys and values, not a list"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, text: str, line: str) -> None:
    with one_line(ConfigError, line, match=f"^fusion.tags: {tmp_path / 'tags.yaml'}: "):
        read(tmp_path, text).served(LABELS)


def test_a_file_that_is_missing_is_named_with_its_key(tmp_path: Path) -> None:
    """Its key differs between the daemon's settings and those of `infer_net.py`."""
    path = tmp_path / "none.yaml"
    for settings, key in (
        (FusionSettings(tags=path), "fusion.tags"),
        (InferSettings(tags=path), "tags"),
    ):
        with pytest.raises(ConfigError, match=f"^{key}: {path}: no such file$"):
            TagRules.read(settings)


def test_the_digest_tells_rules_apart_and_nothing_else(tmp_path: Path) -> None:
    """Neither comments nor the order of names count; no rules have none."""
    assert TagRules.read(FusionSettings()).digest is None
    assert read(tmp_path, "# nothing yet\n").digest is None
    one = read(tmp_path, "hide: [cat, dog]\nmap: {A: [sea]}").digest
    assert one == read(tmp_path, "map: {A: {tags: sea}}  # the same\nhide: [dog, cat]").digest
    others = [
        read(tmp_path, "hide: cat").digest,
        TagRules(min_tags=1).digest,
        TagRules(max_tags=1).digest,
    ]
    assert len({one, *others}) == 4
