"""``--file`` of the commands line by line, dead letters by ID, and which services are started."""

from pathlib import Path

import pytest

from deploy import embedded
from king.messages import PostMessage, parse_message
from scripts.cli import run
from scripts.commands.publish import read_messages
from tests.integration.scripts.test_cli import by_id, command, database, dead, folder
from tests.support.scripts.command import Command, Database

__all__ = ["command", "database", "folder"]  # fixtures


def test_a_line_is_read_as_the_queue_reads_a_body(tmp_path: Path) -> None:
    """JSON objects with priority and force, JSON strings and numbers, and bare IDs."""
    file = tmp_path / "ids.txt"
    lines = ['{"post_id": "a b", "priority": 3, "text": "x"}', '"q"', "42", "post/1#x", "帖子"]
    lines += ['{"post_id": 7, "force": true}', "", "  p\t"]
    file.write_text("\r\n".join(lines), encoding="utf-8-sig")
    messages = read_messages(file)
    assert messages == [parse_message(line) for line in lines if line.strip()]
    assert messages[0] == PostMessage("a b", priority=3)
    assert messages[5] == PostMessage("7", force=True)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"id": "p1"}', 'the message has no "post_id"'),
        ('{"post_id": "p1"', "the message is not JSON"),
        ('["p1"]', "the post_id is a list"),
        ("null", "the post_id is null"),
        ("p1\x0bp2", "control character U+000B"),
        ("x" * 600, "600 bytes"),
        ("p1 12", "holds white space"),
        ("p1\u2003x", "holds white space"),
        ("p{1}", "holds '{'"),
    ],
)
@pytest.mark.parametrize("verb", ["publish", "retag"])
def test_a_line_that_names_no_post_is_refused(
    verb: str, line: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is published or started; the line and the reason are named."""
    file, config = tmp_path / "ids.txt", tmp_path / "settings.yaml"
    file.write_text(f"p0\n\n{line}\np9\n", encoding="utf-8")
    config.write_text(f"embedded: {{folder: '{tmp_path / 'embedded'}'}}\n")
    assert run([verb, "--file", str(file), "--config", str(config)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"insighttag: --file {file}: 1 line names no post, so nothing was done: ")
    assert "line 3: " in err
    assert why in err
    assert err.count("\n") == 1
    assert not (tmp_path / "embedded").exists()


def test_first_bad_lines_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of the wrong kind is one line of complaint, not a thousand."""
    file = tmp_path / "posts.csv"
    file.write_text("".join(f"p{i}, some text\n" for i in range(1000)))
    assert run(["publish", "--file", str(file)]) == 2
    err = capsys.readouterr().err
    assert "1000 lines name no post" in err
    assert "line 5: " in err
    assert "line 6: " not in err
    assert err.endswith("; and 995 more\n")


def test_what_a_line_says_goes_before_the_options(
    command: Command, database: Database, tmp_path: Path
) -> None:
    """A line's own priority and force stand, in whichever line; the others take the options'."""
    file = tmp_path / "ids.jsonl"
    lines = ("a", '{"post_id": "a", "priority": 7}', "b", '{"post_id": "a", "force": true}')
    file.write_text("\n".join(lines))
    words = ("publish", "c", "--file", str(file), "--priority", "2")
    assert command(*words)[:2] == (0, "published 3 to insighttag.posts\n")
    assert by_id(command) == [
        PostMessage("a", priority=7, force=True),
        PostMessage("b", priority=2),
        PostMessage("c", priority=2),
    ]


@pytest.mark.parametrize("verb", ["replay", "drop"])
def test_dead_letters_that_are_not_there_are_named(
    verb: str, command: Command, database: Database
) -> None:
    """Exit 2 and one line; the known ones of the same call are handled all the same."""
    database["jobs"].insert_many([dead("a", "fetch", "FetchRefused"), dead("b", "fuse", "X")])
    code, out, err = command("dead", verb, "nobody", "a", "no one")
    done = "replayed" if verb == "replay" else "dropped"
    assert (code, out) == (2, f"{done} 1\n")
    assert err == (
        f"insighttag: dead {verb}: no dead letter: 'nobody', 'no one' (see insighttag dead list)\n"
    )
    assert [letter["post_id"] for letter in command.json("dead", "list")] == ["b"]
    code, out, err = command("dead", verb, *(f"n{i}" for i in range(30)))
    assert (code, out) == (2, f"{done} 0\n")
    assert err.count("'n") == 10
    assert "and 20 more" in err


def test_a_message_without_an_id_is_no_unknown_letter(command: Command, database: Database) -> None:
    """It cannot be replayed, and the line says what can be done."""
    database["jobs"].insert_one(dead("message:1f", "message", "MessageError"))
    code, out, err = command("dead", "replay", "message:1f")
    assert (code, out) == (2, "replayed 0\n")
    assert err.endswith("names no post, so that it can only be dropped: 'message:1f'\n")
    assert command("dead", "replay", "--all")[0] == 0
    assert command("dead", "drop", "message:1f")[:2] == (0, "dropped 1\n")


def test_only_needed_services_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A queue is filled without a database, dead letters are read without a queue; posts wait."""
    command = Command(tmp_path, capsys)

    def running() -> list[str]:
        return [v.name for v in embedded.status(command.settings) if v.state == "running"]

    try:
        assert command("publish", "p1")[0] == 0
        assert running() == ["redis"]
        assert command.json("dead", "list") == []
        assert sorted(running()) == ["mongo", "redis"]
        assert command.json("status")["queue"]["depth"] == 1
    finally:
        embedded.stop(command.settings)
