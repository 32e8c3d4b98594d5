"""The JSON Schemas in docs/schemas: up to date, with words for each key, true to our own files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from referencing import Registry, Resource

from config.schema import WORDS
from config.section import Section
from fusion.data.data_file import POST_KEYS
from scripts.write_schemas import FOLDER, schemas

ROOT = Path(__file__).resolve().parents[3]
HINT = "# yaml-language-server: $schema=../docs/schemas/"
SCHEMAS = schemas()


def validator(name: str) -> jsonschema.Draft202012Validator:
    files = {f"{each}.schema.json": schema for each, schema in SCHEMAS.items()}
    registry: Registry[Any] = Registry().with_resources(
        (uri, Resource.from_contents(schema)) for uri, schema in files.items()
    )
    return jsonschema.Draft202012Validator(SCHEMAS[name], registry=registry)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_files_are_what_make_schemas_writes(name: str) -> None:
    file = ROOT / FOLDER / f"{name}.schema.json"
    assert json.loads(file.read_text(encoding="utf-8")) == SCHEMAS[name], "run `make schemas`"
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])


def keys(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, section in {"": schema, **schema.get("$defs", {})}.items():
        for key, about in section.get("properties", {}).items():
            yield f"{name}.{key}", about


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_key_is_described(name: str) -> None:
    """A docstring under the key does it, or an entry of `WORDS`."""
    assert [key for key, about in keys(SCHEMAS[name]) if not about.get("description")] == []


def test_every_entry_of_words_is_the_only_one_for_some_key() -> None:
    todo, silent = [Section], set()
    while todo:
        section = todo.pop()
        todo += section.__subclasses__()
        for key, field in section.model_fields.items():
            if not field.description:
                owners = [base.__name__ for base in section.__mro__]
                silent |= {key, *owners, *(f"{owner}.{key}" for owner in owners)}
    assert set(WORDS) - silent == set()


def test_a_post_has_the_keys_that_the_reader_knows() -> None:
    assert set(SCHEMAS["post"]["properties"]) == set(POST_KEYS)


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda p: p.name)
def test_our_own_settings_fit_the_schema_that_they_name(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    first = text.splitlines()[0]
    assert first.startswith(HINT), f"{path.name}: its first line names no schema"
    validator(first.removeprefix(HINT).removesuffix(".schema.json")).validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("name", "content", "fits"),
    [
        ("settings", {"broker": {"prefetch": 8, "url": "redis://h"}}, True),
        ("settings", {"broker": {"prefetch": 0}}, False),
        ("settings", {"brokre": {}}, False),
        ("settings", {"features": {"preset": "small", "image": {"image_size": "x"}}}, False),
        ("train", {"trainer": {"epochs": 5}, "model": {"name": "auto"}}, True),
        ("train", {"task": "image_backbone"}, False),
        ("tags", {"tags": ["cat", {"name": "dog", "synonyms": ["hound"]}]}, True),
        ("tags", {"tags": [{"nam": "dog"}]}, False),
        ("posts", [{"post_id": "1", "text": None, "labels": ["cat"]}, {"post_id": "2"}], True),
        ("posts", {"text": "no ID"}, False),
        ("labels", {"0": "cat", "1": "dog"}, True),
        ("labels", {"cat": "0"}, False),
    ],
)
def test_what_fits_a_schema(name: str, content: Any, fits: bool) -> None:
    assert validator(name).is_valid(content) is fits
