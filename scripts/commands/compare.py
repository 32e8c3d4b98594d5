"""``insighttag bundle compare``: how the tags of two bundles differ, and which are better."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from common.cli import argument, option, print_json, say
from common.errors import BundleError, ConfigError, told
from common.tables import print_table
from config.settings import Settings
from fusion.bundle.folder import newest_version, shadow_folder
from scripts.commands.common import AsJson, Config, Overrides, online_settings, say_row, settings_of

if TYPE_CHECKING:
    from fusion.metrics.agreement import Agreement, Scored

_SHOWN = 15  # tags of the table; --json has all
_BATCH = 64
_LATEST = 10_000  # posts of a database: enough for rare tags; ten times as many take a minute

Documents: TypeAlias = tuple[str, Mapping[str, Any], Mapping[str, Any], Sequence[str]]
"""A post's ID, the results of both, and its labels where they are known."""


def compare(
    one: Annotated[Path | None, argument("A bundle, or a .jsonl of results.", "FIRST")] = None,
    other: Annotated[
        Path | None, argument("The second; with one bundle, FIRST is fusion.bundle.", "SECOND")
    ] = None,
    *,
    data: Annotated[Path | None, option("A data file with features, perhaps labels.", "F")] = None,
    features: Annotated[
        Path | None, option("Root of feature files, for posts that name none.", "DIR")
    ] = None,
    limit: Annotated[
        int | None, option("At most this many posts; 10,000 of a database.", min=1)
    ] = None,
    as_json: AsJson = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Compare the tags of two bundles, and their GAP@20 where posts have labels.

    Without names: the bundle that is served and the one on trial, on the latest posts of the
    database that both have tagged, or on a data file. With names: two bundles on a data file, or
    two outputs of infer_net.py or insighttag tag (.jsonl).
    """
    if one is not None and other is not None and one.suffix == other.suffix == ".jsonl":
        if data is not None or features is not None:
            raise ConfigError("bundle compare: --data and --features are for bundles, not results")
        content = _of_results([str(one), str(other)], _from_files(one, other, limit))
    elif one is None and data is None:
        content = _of_database(online_settings(config, overrides, store=True), limit or _LATEST)
    elif one is not None and ".jsonl" in (one.suffix, other.suffix if other is not None else ""):
        raise ConfigError("bundle compare: name two outputs (.jsonl), or bundles")
    else:
        fusion = settings_of(config, overrides).fusion
        if data is None:
            raise ConfigError(
                "bundle compare: bundles are compared on posts: name a data file with features by "
                "--data F"
            )
        if one is None:
            pair = (fusion.bundle, shadow_folder(fusion))
        else:
            pair = (one, other) if other is not None else (fusion.bundle, one)
        content = _of_bundles(pair, data, features, limit)
    if as_json:
        print_json(content)
    else:
        _print(content)


def _of_database(settings: Settings, limit: int) -> dict[str, Any]:
    """Compare the results that the daemon has written for both bundles."""
    from king.store.documents import shadow_path
    from king.store.queries import open_queries

    store = settings.store
    with open_queries(store) as queries:
        on_trial = newest_version(shadow_folder(settings.fusion))
        pairs = [
            (each.post.post_id, each.result or {}, shadow, each.post.labels)
            for each, shadow in queries.on_trial(on_trial, limit)
        ]
    if not pairs:
        of = f" of {on_trial}" if on_trial is not None else ""
        raise ConfigError(
            f"bundle compare: no post of {store.database}.{store.collection} has "
            f"{shadow_path(store)}{of}: start a trial with insighttag bundle shadow DIR; posts "
            "that the daemon tags after that have it"
        )
    # The latest of both: other bundles may have been served or tried before.
    versions = Counter((shadow["version"], result["version"]) for _, result, shadow, _ in pairs)
    latest = max(versions)
    chosen = [each for each in pairs if (each[2]["version"], each[1]["version"]) == latest]
    names = [_named(chosen[0][1], "served"), _named(chosen[0][2], "shadow")]
    left_out = len(pairs) - len(chosen)
    return {**_of_results(names, iter(chosen)), "of_other_versions": left_out}


def _from_files(one: Path, other: Path, limit: int | None) -> Iterator[Documents]:
    """Yield the results that are in both files, in the order of the first."""
    by_id = dict(_results(other))
    both = ((post_id, result) for post_id, result in _results(one) if post_id in by_id)
    for post_id, result in islice(both, limit):
        yield post_id, result, by_id[post_id], result.get("labels") or ()


def _results(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from fusion.data.data_file import objects

    for where, content in objects(path):
        post_id, tags = content.get("post_id"), content.get("tags")
        if not isinstance(post_id, str) or not isinstance(tags, list):
            raise ConfigError(f"{where}: is not a result: `post_id` or the list `tags` is missing")
        yield post_id, content


def _of_results(names: Sequence[str], posts: Iterator[Documents]) -> dict[str, Any]:
    """Compare results, which have the scores of the tags that were given."""
    import numpy as np

    from fusion.metrics.agreement import Agreement, Scored

    common = list(posts)
    if not common:
        raise ConfigError(f"bundle compare: no post is in both {' and '.join(names)}")
    sides_of = ([post[1] for post in common], [post[2] for post in common])
    predicted = [
        [{str(tag["name"]): float(tag["score"]) for tag in each["tags"]} for each in results]
        for results in sides_of
    ]
    named = dict.fromkeys(name for side in predicted for tags in side for name in tags)
    known = list(named | dict.fromkeys(name for post in common for name in post[3]))
    agreement = Agreement(known, known)
    place = {name: i for i, name in enumerate(agreement.names)}
    for start in range(0, len(common), _BATCH):
        batch = common[start : start + _BATCH]
        sides: list[Scored] = []
        for side in predicted:
            scores = np.full((len(batch), len(place)), np.nan)
            for row, tags in enumerate(side[start : start + _BATCH]):
                for name, score in tags.items():
                    scores[row, place[name]] = score
            sides.append(Scored(scores, ~np.isnan(scores)))
        _add(agreement, [post[0] for post in batch], sides, [post[3] for post in batch])
    return {"first": names[0], "second": names[1], "gap_of": "tags given", **agreement.result()}


def _of_bundles(
    pair: tuple[Path, Path], data: Path, features: Path | None, limit: int | None
) -> dict[str, Any]:
    """Compare two bundles on the posts of a data file."""
    import numpy as np

    from fusion.bundle.bundle import load_bundle
    from fusion.data.data_file import entries, record_of
    from fusion.data.dataset import FeatureFiles
    from fusion.infer.inferer import Inferer, has_seen
    from fusion.metrics.agreement import Agreement, Scored

    bundles = []
    for folder in pair:
        with told("bundle compare", BundleError):
            bundles.append(load_bundle(folder))
    inferers, files = [Inferer(bundle) for bundle in bundles], FeatureFiles(features)
    agreement = Agreement(*(bundle.labels.names for bundle in bundles))
    records = (record_of(e.value, e.where, data) for e in islice(entries(data), limit))
    learned = 0
    while batch := list(islice(records, _BATCH)):
        labels = []
        for record in batch:
            seen = bool(record.labels) and any(has_seen(b, files, record) for b in bundles)
            learned += seen
            labels.append(() if seen else record.labels)
        sides = []
        for inferer in inferers:
            tags = inferer.predict(
                [files.features(r.post_id, r.features, inferer.fingerprints) for r in batch]
            )
            predicted = np.zeros((len(batch), len(inferer.labels)), np.bool_)
            for row, each in enumerate(tags):
                predicted[row, inferer.labels.encode([tag.name for tag in each.tags])] = True
            sides.append(Scored(np.stack([each.scores for each in tags]), predicted))
        _add(agreement, [record.post_id for record in batch], sides, labels, str(data))
    content = agreement.result()
    if not content["posts"]:
        raise ConfigError(f"bundle compare: {data}: holds no posts")
    names = [f"{f} ({b.name} {b.version})" for f, b in zip(pair, bundles, strict=True)]
    return {
        **{"first": names[0], "second": names[1], "gap_of": "all scores"},
        **content,
        "learned_from": learned,
    }


def _add(
    agreement: Agreement,
    post_ids: Sequence[str],
    sides: Sequence[Scored],
    labels: Sequence[Sequence[str]],
    where: str = "labels",
) -> None:
    import numpy as np

    column_of = {name: i for i, name in enumerate(agreement.names)}
    targets = np.zeros((len(post_ids), len(column_of)), np.bool_)
    for row, (post_id, names) in enumerate(zip(post_ids, labels, strict=True)):
        for name in names:
            if name not in column_of:
                raise ConfigError(
                    f"{where}: post {post_id}: neither bundle knows the label {name!r}"
                )
            targets[row, column_of[name]] = True
    labelled = np.array([bool(names) for names in labels], np.bool_)
    agreement.add(post_ids, sides[0], sides[1], targets, labelled)


def _named(result: Mapping[str, Any], state: str) -> str:
    return f"{result.get('model')} {result.get('version')}, {state}"


def _print(content: Mapping[str, Any]) -> None:
    posts, counts, scores = content["posts"], content["tags_given"], content["scores"]
    same, shared = content["same_tags"], f"{counts['both']} of both"
    alone = f"{counts['only_first']} only of the first, {counts['only_second']} only of the second"
    say_row("first", content["first"])
    say_row("second", content["second"])
    say_row("posts", f"{posts}, {same} with the same tags ({same / posts:.1%})")
    say_row("tags", f"{counts['first']} and {counts['second']}: {shared}, {alone}")
    if scores["compared"]:
        correlation = scores["correlation"]
        shown = f"{correlation:.4f}" if correlation is not None else "none: they are all the same"
        mean = f"mean absolute difference {scores['mean_abs_difference']:.4f}"
        say_row("scores", f"{mean}, correlation {shown}, of {scores['compared']}")
    if content["gap"] is not None:
        first, second = content["gap"]
        of = f"{content['gap_of']} of {content['labelled']} labelled posts"
        say_row("GAP@20", f"{first:.4f} and {second:.4f} ({second - first:+.4f}), by {of}")
    if content.get("learned_from"):
        learned = f"{content['learned_from']} labelled posts that one of them, or an encoder"
        say_row("", f"without {learned}, was trained on")
    if content.get("of_other_versions"):
        say_row("", f"without {content['of_other_versions']} posts of other versions")
    changed = [tag for tag in content["tags"] if tag["only_first"] or tag["only_second"]]
    if not changed:
        return
    rows = [
        (
            tag["name"],
            *(tag[key] for key in ("first", "second", "only_first", "only_second")),
            "" if tag["mean_difference"] is None else f"{tag['mean_difference']:+.4f}",
        )
        for tag in changed[:_SHOWN]
    ]
    columns = ("tag", "first", "second", "only first", "only second", "score")
    print_table("", columns, rows, right=(1, 2, 3, 4, 5))
    if len(changed) > _SHOWN:
        say(f"and {len(changed) - _SHOWN} more tags\n")
    for post in content["differing_posts"][:3]:
        say(f"for example {json.dumps(post, ensure_ascii=False)}\n")
