"""Real drawings without any weights: HOG, TF-IDF and the linear probe, GAP@20 and mAP by author.

The posts of ``scripts/data_scripts/make_openclipart_posts.py`` are split into four folds of
authors. Of each fold, the other authors' texts are counted (``task: text_backbone``'s code), and a
`LinearProbe` is solved over them and the pictures' HOG with its default settings: together, and one
modality at a time, whose logits are averaged too. The baseline is what one would do with
scikit-learn: its TfidfVectorizer over all 1- to 4-grams and HOG, each of norm 1, joined, with
logistic regression of C = 10. It is solved by our solver, which a test holds against
scikit-learn's. Pictures are decoded once and kept in ``--work``.

Run: ``python bench/openclipart_no_weights.py --posts DIR``, DIR with posts.json and idx2name.json.
Results: ``bench/results/openclipart_no_weights.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a plain script too

from openclipart import figures, show, split_posts, summary, truth_of
from results_file import FOLDER, write_results

from common.errors import MediaError
from common.post import Stream
from common.progress import notice, progress_bar
from config.features import ImageSettings
from config.fusion_models import ModelSettings
from config.labels import LabelMap
from extractors.models.visual import VisualExtractor
from fusion.backbones.media import MediaItems
from fusion.backbones.text import fit_tfidf
from fusion.models import build_model
from fusion.models.base import Collate, InputSchema, Sample
from fusion.models.probe import logistic

Rows: TypeAlias = npt.NDArray[np.float32]
Entries: TypeAlias = Sequence[Mapping[str, Any]]
SIDE, GRAMS = 64, 8192
C = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, decode, solve, print, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--posts", type=Path, required=True, help="folder of posts.json")
    parser.add_argument("--work", type=Path, default=Path("workshop/openclipart"))
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result")
    parser.add_argument("--count", type=int, default=0, help="a sample of the posts; 0: all")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    entries = json.loads((options.posts / "posts.json").read_text(encoding="utf-8"))
    if options.count:
        entries = random.Random(0).sample(entries, options.count)
    labels = LabelMap.load(options.posts / "idx2name.json")
    truth = truth_of(entries, labels)
    row_of = {entry["post_id"]: row for row, entry in enumerate(entries)}
    pictures = hog(entries, options.work)
    folds_of: dict[str, list[dict[str, float]]] = {}
    for number, sides in enumerate(split_posts(entries, "author")):
        learned, test = (
            np.array([row_of[entry["post_id"]] for entry in sides[side]])
            for side in ("train", "test")
        )
        for name, logits in scored(entries, pictures, truth, learned, test).items():
            folds_of.setdefault(name, []).append(figures(logits, truth[test]))
            notice(f"fold {number} {name}: {folds_of[name][-1]}")
    results = [summary("author", name, [folds]) for name, folds in folds_of.items()]
    show(results)
    facts = {"posts": len(entries), "tags": len(labels)}
    file = write_results("openclipart_no_weights", 1, [facts, *results], options.out)
    print(f"written to {file}")
    return 0


def hog(entries: Entries, work: Path) -> list[npt.NDArray[np.float16]]:
    """Return HOG and colours of each post, ``(1, dim)``; ``(0, dim)`` of a picture too large."""
    file = work / f"pictures-{SIDE}.npz"
    if not file.exists():
        decoded: dict[str, npt.NDArray[np.uint8]] = {}
        with progress_bar("decode", len(entries)) as bar:
            for entry in entries:
                try:
                    path = Path(entry["images"][0])
                    decoded[entry["post_id"]] = MediaItems().picture(path, SIDE)
                except MediaError as error:
                    notice(f"{entry['post_id']}: {error}")
                bar.advance()
        work.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, **decoded)  # type: ignore[arg-type]
    extractor = VisualExtractor("image", ImageSettings(arch="hog", image_size=SIDE))
    extractor.load()
    with np.load(file) as pixels:
        none = np.empty((0, SIDE, SIDE, 3), np.uint8)
        of_post = {name: pixels[name][None] for name in pixels.files}
    return extractor.forward([of_post.get(e["post_id"], none) for e in entries])


def scored(
    entries: Entries,
    pictures: Sequence[npt.NDArray[np.float16]],
    truth: Rows,
    learned: npt.NDArray[np.intp],
    test: npt.NDArray[np.intp],
) -> dict[str, Rows]:
    """Return logits of a fold's posts by each model."""
    tfidf = fit_tfidf((entries[row]["text"] for row in learned), GRAMS)
    texts = [tfidf.vector(entry["text"])[None].astype(np.float16) for entry in entries]
    streams: dict[Stream, Sequence[npt.NDArray[np.float16]]] = {"image": pictures, "text": texts}

    def probed(*names: Stream) -> Rows:
        dims = {name: streams[name][0].shape[1] for name in names}
        schema = InputSchema(dims, dict.fromkeys(names, 1), truth.shape[1])
        model = build_model(schema, ModelSettings(name="linear_probe"))

        def sample(row: int) -> Sample:
            arrays = {name: streams[name][row] for name in names}
            has = {name: array for name, array in arrays.items() if len(array)}
            return Sample(str(row), has, truth[row])

        collate = Collate(schema)
        solutions = model.solutions([collate([sample(row) for row in learned])])
        for _ in solutions or ():
            pass  # without validation the last solution counts
        with torch.inference_mode():
            logits: Rows = model.eval()(collate([sample(row) for row in test])).numpy()
        return logits

    text, image = probed("text"), probed("image")
    return {
        "linear probe: TF-IDF": text,
        "linear probe: HOG": image,
        "mean of the two": ((text + image) / 2).astype(np.float32),
        "linear probe: both": probed("image", "text"),
        "baseline: TF-IDF + HOG, logistic regression": baseline(
            entries, pictures, truth, learned, test
        ),
    }


def baseline(
    entries: Entries,
    pictures: Sequence[npt.NDArray[np.float16]],
    truth: Rows,
    learned: npt.NDArray[np.intp],
    test: npt.NDArray[np.intp],
) -> Rows:
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    counts = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True)
    counts.fit([entries[row]["text"] for row in learned])
    shapes = np.stack([p[0] if len(p) else np.zeros(p.shape[1]) for p in pictures])[:, :1764]

    def rows(which: npt.NDArray[np.intp]) -> Any:
        texts = counts.transform([entries[row]["text"] for row in which])
        return hstack([texts, csr_matrix(normalize(shapes[which].astype(np.float32)))]).tocsr()

    train = rows(learned)
    # The posts' own directions are all that the solution can lie in; 100,000 n-grams are too many.
    values, vectors = np.linalg.eigh((train @ train.T).toarray().astype(np.float64))
    vectors, root = vectors[:, values > 1e-6], np.sqrt(values[values > 1e-6])
    inputs = torch.from_numpy((vectors * root).astype(np.float32))
    [(weight, bias, _)] = logistic(inputs, torch.from_numpy(truth[learned]), [1 / C])
    other = np.asarray(rows(test) @ (train.T @ (vectors / root))).astype(np.float32)
    logits: Rows = other @ weight.numpy().T + bias.numpy()
    return logits


if __name__ == "__main__":
    sys.exit(main())
