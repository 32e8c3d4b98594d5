"""The texts of tags, ``tags.yaml``: a tag is found by what is written about it, not by examples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, Field, model_validator

from config.labels import LabelMap
from config.load import read_yaml, validate
from config.section import Section


def _words(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


def _template(text: str) -> str:
    if text.count("{}") != 1:
        raise ValueError("must hold {} once, where the tag's name goes")
    return text


Text: TypeAlias = Annotated[str, AfterValidator(_words)]

# A name alone is a poor sentence: on openclipart these raise mAP from 0.33 to 0.40.
TEMPLATES = ("{}", "a post about {}", "a picture of {}")


class TagEntry(Section):
    """One tag; a name alone may stand for it."""

    name: Text
    descriptions: tuple[Text, ...] = ()
    """Sentences on what the tag means, in any language that the encoders know."""
    synonyms: tuple[Text, ...] = ()
    """Other names."""
    negatives: tuple[Text, ...] = ()
    """Texts on what is easily taken for the tag: posts about them have it not."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class TagTexts(Section):
    """The content of ``tags.yaml``."""

    templates: tuple[Annotated[str, AfterValidator(_template)], ...] = TEMPLATES
    """Sentences that are made of names and synonyms; write them in the tags' language."""
    tags: tuple[TagEntry, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _unlike(self) -> TagTexts:
        name, count = Counter(tag.name for tag in self.tags).most_common(1)[0]
        if count > 1:
            raise ValueError(f"tags: {name!r} appears twice")
        if not self.templates:
            raise ValueError("templates: give at least one, such as {}")
        return self

    def labels(self) -> LabelMap:
        return LabelMap(tuple(tag.name for tag in self.tags))

    def sentences(self, tag: TagEntry) -> list[list[str]]:
        """Return what says that a post has the tag: of its name, its synonyms, its descriptions.

        Each of these counts alike, however many sentences it has; what a tag lacks is left out.
        """
        name, synonyms = (
            [template.replace("{}", word) for word in words for template in self.templates]
            for words in ((tag.name,), tag.synonyms)
        )
        return [group for group in (name, synonyms, list(tag.descriptions)) if group]


def load_tag_texts(path: Path) -> TagTexts:
    """Read ``tags.yaml``; ConfigError names the file, the tag and the mistake in one line."""
    return validate(TagTexts, read_yaml(path), str(path))
