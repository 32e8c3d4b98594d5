"""Duplicates: planted ones are found, others are not, and the same groups come each time."""

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn

from common.post import Media, Post
from corpus.analyze.duplicates import Group, GroupTally, find_groups, group_line
from corpus.analyze.looks import hash_of, look_of, near_pairs, same_colours
from corpus.analyze.measure import MediaFact
from corpus.analyze.texts import Bands, comparable, jaccard, key_of, normal, shingles
from extractors.media.pictures import read_pictures, squash
from fusion.data.data_file import CorpusPost, read_posts
from tests.support.corpus.analyze_corpus import Corpus, make_corpus
from tests.support.media import halves, noise, solid


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def facts_of(folder: Path) -> Callable[[str], MediaFact | None]:
    """Facts of pictures on disk, by nothing but their own functions."""

    def fact(source: str) -> MediaFact:
        path = folder / source
        look = None
        if path.suffix in {".jpg", ".png", ".webp"}:
            look = look_of(next(iter(read_pictures(path, max_pixels=10**7))))
        return MediaFact(hashlib.sha256(path.read_bytes()).hexdigest(), "image", look=look)

    return fact


def groups_of(corpus: Corpus) -> list[Group]:
    posts = [post for post in read_posts(corpus.file) if isinstance(post, CorpusPost)]
    return list(find_groups(posts, facts_of(corpus.file.parent)))


def pairs(groups: list[Group], kind: str) -> set[frozenset[str]]:
    return {
        frozenset(pair)
        for group in groups
        if group.kind == kind
        for pair in itertools.combinations(group.members, 2)
    }


def test_planted_duplicates_are_found_and_nothing_else(corpus: Corpus) -> None:
    groups = groups_of(corpus)
    exact, near, texts = (pairs(groups, k) for k in ("exact_media", "near_image", "near_text"))
    assert exact == {frozenset(pair) for pair in corpus.exact}
    # A copy of a picture's file looks like the picture's other copies too.
    planted = {frozenset(pair) for pair in corpus.near}
    assert len(planted) >= 10
    first = dict(corpus.near)
    also = {
        frozenset(pair)
        for source, twin in corpus.exact
        for pair in ((source, twin), (first.get(source, source), twin))
        if len(set(pair)) == 2
    }
    assert planted <= near
    assert near - planted <= also
    assert {frozenset(pair) for pair in corpus.texts} <= texts
    assert not {frozenset(pair) for pair in corpus.apart} & texts


def test_the_same_posts_give_the_same_groups(corpus: Corpus) -> None:
    """Same order of groups and members; members stand in the order of the posts."""
    order = {post["post_id"]: i for i, post in enumerate(corpus.posts)}
    groups = groups_of(corpus)
    assert groups == groups_of(corpus)
    for group in groups:
        assert len(group.members) > 1
        places = [order[member] for member in group.members]
        assert places == sorted(set(places))


def test_exact_texts_form_one_group_however_many() -> None:
    """A text that half of the posts share is one group, in parts that hang together."""
    text = "Congratulations, you are today's lucky visitor, write to us for your gift card"
    posts = [CorpusPost(Post(str(i), text=text if i % 2 else f"{i} {i * 7919:x} " * 5))
             for i in range(3000)]  # fmt: skip
    groups = [g for g in find_groups(posts, lambda source: None) if "1" in g.members]
    assert [len(group.members) for group in groups] == [1000, 501]
    assert [group.continued for group in groups] == [False, True]
    assert groups[1].members[0] == groups[0].members[0] == "1"
    assert len({member for group in groups for member in group.members}) == 1500
    tally = GroupTally(lambda post_id: frozenset({"even" if int(post_id) % 4 == 1 else "odd"}))
    for group in groups:
        tally.add(group)
    counts = tally.as_dict()["kinds"]["near_text"]
    assert [counts[key] for key in ("groups", "posts", "largest", "labels_differ")] == [
        1, 1500, 1500, 1,
    ]  # fmt: skip
    assert [each["posts"] for each in (*counts["examples"], *counts["disputes"])] == [1500, 1500]
    written = [json.loads(group_line(group)) for group in groups]
    assert [line.get("continued") for line in written] == [None, True]


def test_text_with_a_number_in_it_is_one_group() -> None:
    """Thousands of distinct near-copies meet in the same buckets; all become one group."""
    text = "Order {} is on its way to you, please be at home between nine and noon to receive it"
    posts = [CorpusPost(Post(str(i), text=text.format(1000 + i))) for i in range(1000)]
    groups = list(find_groups(posts, lambda source: None, text_threshold=0.85))
    assert [len(group.members) for group in groups] == [1000]


def test_broken_files_link_no_posts() -> None:
    """An error page in place of a hundred pictures is no duplicate of anything."""
    fact = MediaFact("ab" * 32, "image", reason="is not a picture: HTML page")
    posts = [CorpusPost(Post(str(i), media=(Media("image", "x"),))) for i in range(3)]
    assert list(find_groups(posts, lambda source: fact)) == []


def test_equal_structure_of_other_colour_is_not_alike() -> None:
    """The hash is of brightness alone: a red ball and a blue one are told apart by their colours.

    The two colours have the same brightness, 100 of 255.
    """
    red = halves(64, 64, (220, 55, 18), (20, 20, 20))
    blue = halves(64, 64, (20, 110, 255), (20, 20, 20))
    one, other = look_of(red), look_of(blue)
    assert one is not None
    assert other is not None
    assert (hash_of(one) ^ hash_of(other)).bit_count() <= 6
    assert not same_colours(one, other)


def test_look_of_plain_picture_is_none() -> None:
    """All white pages have one look: none."""
    assert look_of(solid(40, 30)) is None


def test_structure_hash_is_that_of_scipy(corpus: Corpus) -> None:
    """The bits are those of another DCT and another grey, but for coefficients on the edge."""
    path = next(corpus.file.parent.glob("media/near-*.jpg"))
    pixels = np.asarray(Image.open(path).convert("RGB"))
    look = look_of(pixels)
    assert look is not None
    grey = np.asarray(Image.fromarray(squash(pixels, 32, 32)).convert("L"), np.float64)
    low = dctn(grey, norm="ortho")[:8, :8].reshape(-1)[1:]
    above = low - np.median(low) - 4  # the margin
    expected = above > 0
    clear = np.abs(above) > 0.5  # greys are rounded in two ways
    got = np.unpackbits(np.frombuffer(look[:8], np.uint8))[1:].astype(bool)
    assert clear.sum() > 20
    assert (got == expected)[clear].all()


@pytest.mark.parametrize("distance", [0, 3, 6, 16])
def test_near_pairs_are_those_of_brute_force(distance: int) -> None:
    random = np.random.default_rng(distance)
    hashes = random.integers(0, 2**64, 300, np.uint64)
    for i in range(200, 300):  # neighbours at 0 to 19 bits
        flips = random.choice(64, i % 20, replace=False)
        mask = np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64), initial=0)
        hashes[i] = hashes[i - 200] ^ np.uint64(mask)
    expected = {
        (i, j)
        for i, j in itertools.combinations(range(300), 2)
        if (int(hashes[i]) ^ int(hashes[j])).bit_count() <= distance
    }
    assert {(min(pair), max(pair)) for pair in near_pairs(hashes, distance)} == expected
    assert expected


def test_bands_let_texts_at_the_threshold_meet() -> None:
    """At least 97 in 100 texts as alike as the threshold share a band."""
    random = np.random.default_rng(1)
    bands = Bands(0.9)
    met = 0
    for _ in range(100):
        words = ["".join(map(chr, random.integers(97, 123, 9))) for _ in range(200)]
        one, other = frozenset(words[:190]), frozenset(words[10:])
        assert jaccard(one, other) == pytest.approx(0.9)
        met += bool(set(bands.keys(one)) & set(bands.keys(other)))
    assert met >= 97


def test_texts_are_compared_without_case_width_and_spaces() -> None:
    """Full-width letters, capitals and line breaks change nothing; short texts say nothing."""
    assert normal(" Ｈello\n  WORLD ") == "hello world"
    assert key_of(normal("A  b")) == key_of(normal("a b"))
    assert comparable("今天早上我们走到灯塔") is True
    assert comparable("good night") is False
    assert shingles("ab") == {"ab"}


def test_noise_pictures_are_not_alike() -> None:
    looks = {str(i): look_of(noise(48, 36, seed=i)) for i in range(100)}
    posts = [CorpusPost(Post(s, media=(Media("image", s),))) for s in looks]

    def fact(source: str) -> MediaFact:
        return MediaFact(f"{int(source):064x}", "image", look=looks[source])

    assert list(find_groups(posts, fact)) == []
