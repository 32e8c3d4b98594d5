"""The OpenAPI document is valid, and says of routes, bodies and answers what the code does."""

import re
from dataclasses import fields
from typing import Any
from unittest.mock import patch

import pytest
from jsonschema import ValidationError
from openapi_spec_validator import validate

from common.post import TagResult
from fusion.data.data_file import MEDIA_KEYS
from tests.support.web.fixtures import Desk
from web import openapi
from web.reading import QueueBody, TagBody

DOCUMENT: Any = openapi.document()
SCHEMAS = DOCUMENT["components"]["schemas"]
# For people, and no part of the interface.
PAGES = {"/", "/docs", "/assets/{name}"}


def test_the_document_is_valid_openapi(desk: Desk) -> None:
    served = desk.client.get("/openapi.json")
    assert served.status_code == 200
    assert served.json == DOCUMENT
    validate(served.json)


def test_it_has_every_route_and_method_that_is_served_and_no_other(desk: Desk) -> None:
    served = set()
    for rule in desk.client.application.url_map.iter_rules():
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)
        if path not in PAGES:
            served |= {(path, each.lower()) for each in rule.methods & {"GET", "POST", "PUT"}}
    described = {
        (path, method)
        for path, item in DOCUMENT["paths"].items()
        for method in item
        if method != "parameters"
    }
    assert described == served


@pytest.mark.parametrize(
    ("schema", "keys"),
    [
        ("Post", set(TagBody.model_fields)),
        ("PostForm", {"text", "post_id", *MEDIA_KEYS.values()}),
        ("QueueBody", set(QueueBody.model_fields)),
        # The result of a bundle on trial goes to the database alone.
        ("Tagged", {each.name for each in fields(TagResult)} - {"shadow"} | {"scores"}),
    ],
)
def test_a_schema_has_the_keys_that_the_code_has(schema: str, keys: set[str]) -> None:
    assert set(SCHEMAS[schema]["properties"]) == keys


def test_an_answer_that_is_not_as_described_is_noticed(desk: Desk) -> None:
    """The client of these tests holds every answer to the document: here to a wrong one."""
    described = SCHEMAS["Health"]["properties"]
    with patch.dict(described, {"status": {"type": "integer"}}), pytest.raises(ValidationError):
        desk.client.get("/healthz")
    assert desk.client.get("/healthz").status_code == 200


def test_the_page_shows_every_operation_and_schema_and_runs_under_the_policy(desk: Desk) -> None:
    page = desk.client.get("/docs")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    for _, _, operations in openapi.groups():
        for each in operations:
            assert f'id="{each.name}"' in page.text
    targets = re.findall(r'href="#([^"]+)"', page.text)
    assert {name for name, _, _ in openapi.schemas()} <= set(re.findall(r'id="([^"]+)"', page.text))
    assert all(f'id="{target}"' in page.text for target in targets)
    # Nothing is loaded from elsewhere, and nothing inline, which the policy would refuse.
    assert not re.search(r"""(src|href)=["'](https?:)?//|style=|<script""", page.text)
