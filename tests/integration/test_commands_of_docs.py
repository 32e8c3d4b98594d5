"""Every command, key of a setting and endpoint that the documents name exists.

Commands of blocks are parsed by the programs' own parsers; nothing is run.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import parsers
import pytest
import yaml
from pydantic import BaseModel

from common.errors import ConfigError
from config.load import validate
from config.settings import InferSettings, Settings
from config.tag_rules import TagFile
from config.tags import TagTexts
from config.train import BackboneTrainSettings, TrainSettings
from tests.support.docs.shell import FENCE, PAGES, ROOT, Command, blocks, commands
from tests.support.processes import ran
from tests.unit.test_house_style import modules
from web import openapi

MODELS: tuple[type[BaseModel], ...] = (
    Settings,
    TrainSettings,
    BackboneTrainSettings,
    InferSettings,
    TagTexts,
    TagFile,
)
# Files of other programs, by the key that tells them.
FOREIGN = {"scrape_configs", "services", "apiVersion"}
SECTIONS = {name for model in MODELS[:4] for name in model.model_fields}

_OUR_FILE = re.compile(r"(?:config|deploy|bench)/[\w./-]+\.\w+")
_DOTTED = re.compile(r"(?<!`)`([a-z_0-9]+(?:\.[a-z_0-9]+)+)`(?!`)")
_ENDPOINT = re.compile(r"(?<![A-Za-z_.])(/v1/[\w{}/]+|/(?:healthz|readyz|openapi\.json)\b)")
# `--posts N` in a line that shows what can be given.
_PLACEHOLDER = re.compile(r"'?[A-Z]+'? is not a valid (integer|float)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_one_that_its_program_takes(page: Path) -> None:
    mistakes = [
        f"{it.where}: {' '.join(it.words)}: {said}" for it in commands(page) if (said := wrong(it))
    ]
    assert mistakes == []


def test_pages_have_commands_of_every_kind() -> None:
    """The reader of pages reads: an empty list would make the other tests empty too."""
    documented = [it for page in PAGES for it in commands(page)]
    assert {it.words[0] for it in documented} == {"insighttag", "python", "make"}
    assert len([it for it in documented if not it.synopsis]) > 50


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("insighttag tga post.json", "No such command"),
        ("insighttag tag post.json --jsn", "No such option"),
        ("insighttag tag", "Missing argument"),
        ("insighttag dead lst", "No such command"),
        ("python train_net.py --model_confg F", "No such option"),
        ("python trainnet.py", "no such script"),
        ("make demmo", "no such target"),
        ("make bench BENCH_ARG=1", "no such variable"),
        ("python train_net.py --model_config config/none.yaml", "no such file"),
        ("python bench/scale.py --kngs 1", "unrecognized arguments"),
    ],
)
def test_a_wrong_command_is_noticed(line: str, said: str) -> None:
    assert said in wrong(Command("here", tuple(line.split())))


def wrong(command: Command) -> str:
    """Return what is wrong with a command; nothing where it is right."""
    words = command.words
    if words[0] == "make":
        return wrong_make(words)
    if words[:2] in (("python", "-m"), ("python", "-c")):
        return ""
    named = [w for w in words[2:] if _OUR_FILE.fullmatch(w) and not (ROOT / w).is_file()]
    if named:
        return f"no such file: {named[0]}"
    try:
        (parsers.check_names if command.synopsis else parsers.check)(words)
    except LookupError:
        pass  # a script without options
    except parsers.WrongCommandLineError as error:
        return "" if _PLACEHOLDER.search(str(error)) else str(error)
    sets = [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("--set", "--model_set")]
    return next((f"--set {it}: no such key" for it in sets if not settable(it)), "")


def wrong_make(words: tuple[str, ...]) -> str:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words[1:]:
        name, assigns, _ = word.partition("=")
        match = re.search(rf"^{name} *[?:]?=" if assigns else rf"^{name}:", text, re.MULTILINE)
        if match is None:
            return f"no such {'variable' if assigns else 'target'}: {word}"
    return ""


def settable(override: str) -> bool:
    """Return True for ``a.b=c`` whose key some settings have, or which stands for any key.

    Keys have a section: ``bundle thresholds --set TAG=X`` is about tags.
    """
    if override == "a.b=c" or not re.match(r"[\w]+\.[^=]+=", override):
        return True
    # A value may be a file or a variable of the shell: the key is what must exist.
    return any(leads_to_a_field(model, override.partition("=")[0]) for model in MODELS)


def leads_to_a_field(model: type[BaseModel], path: str) -> bool:
    name, _, rest = path.partition(".")
    field = model.model_fields.get(name)
    if field is None:
        return False
    inside = [each for each in types_in(field.annotation) if issubclass(each, BaseModel)]
    if not rest:
        return True
    return not inside or any(leads_to_a_field(each, rest) for each in inside)


def types_in(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type):
        yield annotation
    for each in get_args(annotation):
        yield from types_in(each)


def test_make_would_run_every_target_that_a_page_names() -> None:
    named = {it.words[1] for page in PAGES for it in commands(page) if it.words[0] == "make"}
    dry = ran("make", "-n", "PYTHON=python3", *sorted(named))
    assert dry.returncode == 0, dry.stderr


YAML = [(page, *block) for page in PAGES for block in blocks(page, "yaml")]


@pytest.mark.parametrize(
    ("page", "line", "text"), YAML, ids=[f"{page.name}:{line}" for page, line, _ in YAML]
)
def test_yaml_of_a_page_has_known_keys_and_good_values(page: Path, line: int, text: str) -> None:
    content = yaml.safe_load(text)
    if set(content) & FOREIGN:
        return
    reasons = []
    for model in MODELS:
        try:
            validate(model, content, f"{page.name}:{line}")
        except ConfigError as error:
            reasons.append(str(error))
    assert len(reasons) < len(MODELS), reasons


@cache
def code() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in modules())


def exists(name: str) -> bool:
    """Return True for a key of some settings, an event of the log, or a module of the code."""
    if name.endswith(".py") or any(leads_to_a_field(model, name) for model in MODELS):
        return True
    module = ROOT / name.replace(".", "/")
    beside = module.parent.with_suffix(".py")
    member = rf"^(?:def|class) {module.name}\b|^{module.name}\b.*="
    return (
        f'"{name}"' in code()
        or module.is_dir()
        or module.with_suffix(".py").is_file()
        or (beside.is_file() and re.search(member, beside.read_text("utf-8"), re.M) is not None)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_dotted_name_that_begins_as_a_section_is_a_key_event_or_module(page: Path) -> None:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    named = {it for it in _DOTTED.findall(prose) if it.partition(".")[0] in SECTIONS}
    assert sorted(it for it in named if not exists(it)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_endpoint_of_a_page_is_served(page: Path) -> None:
    # The last is a collector's, by the protocol of OpenTelemetry.
    served = {*openapi.document()["paths"], "/docs", "/v1/traces"}
    text = page.read_text(encoding="utf-8")
    documented = {re.sub(r"(?<=/v1/posts/).+", "{post_id}", it) for it in _ENDPOINT.findall(text)}
    # `/v1/posts` stands for all below it.
    assert (
        sorted(
            it for it in documented if not any(f"{path}/".startswith(f"{it}/") for path in served)
        )
        == []
    )


def test_wrong_keys_and_endpoints_are_noticed() -> None:
    assert not settable("broker.ulr=redis://h")
    assert not exists("fetch.conections")
    assert not exists("king.store_unreachabel")
    assert wrong(Command("here", ("insighttag", "status", "--set", "broker.ulr=x")))
    assert _ENDPOINT.findall("`POST /v1/tga` and http://127.0.0.1:8080/v1/x/y") == [
        "/v1/tga",
        "/v1/x/y",
    ]
