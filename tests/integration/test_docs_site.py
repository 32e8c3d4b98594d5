"""The documentation site: it is built without a warning, loads nothing from elsewhere, is whole."""

import re
from pathlib import Path

import commands_page
import parsers
import pytest
import yaml
from docs_site import ROOT_PAGES

import insighttag
from config.settings import Settings
from config.train import TrainSettings
from tests.support.docs.shell import ROOT
from tests.support.processes import python


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a link or an anchor that leads nowhere ends the build."""
    folder = tmp_path_factory.mktemp("site")
    words = ("mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder))
    built = python("-m", *words, timeout_s=500, NO_MKDOCS_2_WARNING="1")
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def text(site: Path, page: str) -> str:
    return (site / page).read_text(encoding="utf-8")


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    """No font, script, style or picture of another host; links lead where readers ask to go."""
    loaded = re.compile(
        r"""<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=["'](?:https?:)?//[^>]*>"""
    )
    foreign = {page.name: loaded.findall(page.read_text("utf-8")) for page in site.glob("*.html")}
    assert {page: tags for page, tags in foreign.items() if tags} == {}
    styles = [*site.rglob("*.css")]
    assert styles
    assert not [
        path
        for path in styles
        if re.search(r"(url\(|@import ?)[\"']?(https?:)?//", path.read_text("utf-8"))
    ]


def test_every_alert_has_an_anchor_in_both_languages(site: Path) -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text("utf-8"))
    for group in rules["groups"]:
        for rule in group["rules"]:
            _, anchor = rule["annotations"]["runbook"].split("#")
            for page in ("alerts.html", "alerts.zh-CN.html"):
                assert f'id="{anchor}"' in text(site, page)


def test_every_command_setting_and_script_is_in_the_reference(site: Path) -> None:
    commands = text(site, "commands.html")
    for name, _ in parsers.subcommands(parsers.insighttag()):
        assert f">insighttag {name}".rstrip() in commands
    assert set(commands_page.SCRIPTS) == commands_page.owner_scripts()
    for page, model in (("settings.html", Settings), ("training-settings.html", TrainSettings)):
        for name, field in model.model_fields.items():
            fields = getattr(field.annotation, "model_fields", {"": None})
            assert all(f"{name}.{it}".rstrip(".") in text(site, page) for it in fields)


def test_every_name_that_the_package_exports_is_in_the_reference(site: Path) -> None:
    reference = text(site, "python-reference.html")
    assert [name for name in insighttag.__all__ if f'id="insighttag.{name}"' not in reference] == []


def test_pages_have_the_language_of_their_words_and_a_way_to_the_other(site: Path) -> None:
    for page, in_chinese in ((p, p.name.endswith(".zh-CN.html")) for p in site.glob("*.html")):
        if page.name == "404.html":
            continue
        head = page.read_text("utf-8")
        assert f'<html lang="{"zh" if in_chinese else "en"}"' in head, page.name
        other = (
            page.name.replace(".zh-CN", "")
            if in_chinese
            else page.name.replace(".html", ".zh-CN.html")
        )
        assert f'href="{other if (site / other).exists() else "index"}' in head, page.name


def test_the_plan_is_no_page_and_every_page_of_docs_is_one(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} | {
        page.removesuffix(".md") for page in ROOT_PAGES.values()
    }
    assert pages - {path.stem for path in site.glob("*.html")} == {"plan"}
    assert (site / "files" / "deploy" / "prometheus" / "alerts.yml").is_file()
