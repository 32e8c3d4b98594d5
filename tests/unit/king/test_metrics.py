"""Metrics stay few and readable, whatever names come along."""

from prometheus_client import Counter, generate_latest

from king.metrics import Children, new_registry


def test_names_past_a_limit_are_counted_as_other() -> None:
    registry = new_registry()
    tags = Children(Counter("insighttag_tags", "Tags", ["tag"], registry=registry))
    for number in range(1500):
        tags(f"tag {number}").inc()
    tags("tag 0").inc()
    assert registry.get_sample_value("insighttag_tags_total", {"tag": "tag 0"}) == 2
    assert registry.get_sample_value("insighttag_tags_total", {"tag": "tag 1000"}) is None
    assert registry.get_sample_value("insighttag_tags_total", {"tag": "other"}) == 500


def test_a_name_that_is_no_text_spoils_no_scrape() -> None:
    """A lone surrogate out of a JSON file, quotes and line breaks."""
    registry = new_registry()
    tags = Children(Counter("insighttag_tags", "Tags", ["tag"], registry=registry))
    for name in ("\ud800", 'a"b\n', "\u96e8"):
        tags(name).inc()
    lines = [
        line
        for line in generate_latest(registry).decode().splitlines()
        if line.startswith("insighttag_tags_total{")
    ]
    assert [line.rpartition(" ")[0] for line in lines] == [
        'insighttag_tags_total{tag="?"}',
        'insighttag_tags_total{tag="a\\"b\\n"}',
        'insighttag_tags_total{tag="\u96e8"}',
    ]
