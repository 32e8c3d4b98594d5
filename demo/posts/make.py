"""Make the media of a planned post, and the data file of a split."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from common.files import write_whole
from demo.parallel import process_pool
from demo.posts.encode import write_picture, write_sound, write_video
from demo.posts.motion import FRAME_RATE_HZ, FRAMES, clip
from demo.posts.pictures import scene, sign
from demo.posts.plan import DATA_FILE, PostPlan
from demo.posts.sounds import SAMPLE_RATE_HZ, sound
from demo.posts.words import post_text, sign_lines

MEDIA_FOLDER = "media"


class Entry(TypedDict):
    """One post of the data file; paths are relative to the data file's folder."""

    post_id: str
    labels: list[str]
    text: str
    ocr: str | None
    images: list[str]
    videos: list[str]
    audios: list[str]
    features: str


def make_post(folder: Path, plan: PostPlan) -> Entry:
    """Draw, synthesise and encode one post's media into ``folder/media``."""
    rng = np.random.default_rng(plan.seed)
    has = plan.contents
    for_video, for_file = _share_sounds(rng, plan)
    entry = Entry(
        post_id=plan.post_id,
        labels=list(plan.tags),
        text=post_text(rng, has["text"], plan.noise) if "text" in has else "",
        ocr=None,  # still to be read: the words are in the picture
        images=_images(folder, plan, rng),
        videos=_video(folder, plan, rng, for_video),
        audios=_sound(folder, plan, rng, for_file),
        features="",
    )
    if not (entry["text"] or entry["images"] or entry["videos"] or entry["audios"]):
        entry["text"] = post_text(rng, (), plan.noise)
    return entry


def _share_sounds(
    rng: np.random.Generator, plan: PostPlan
) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Return the sounds of the video and of the sound file; None without one."""
    if "audio" not in plan.contents:
        return None, None
    keys = plan.contents["audio"]
    if "video" not in plan.contents or rng.random() < 0.3:
        return None, keys
    if rng.random() < 0.5:
        return keys, None
    return keys[:1], keys[1:] if len(keys) > 1 else None


def _images(folder: Path, plan: PostPlan, rng: np.random.Generator) -> list[str]:
    pictures = []
    if "image" in plan.contents:
        keys = plan.contents["image"]
        apart = len(keys) > 1 and rng.random() < 0.5
        shown = [(key,) for key in keys] if apart else [keys]
        pictures += [scene(rng, objects, plan.noise) for objects in shown]
    if "ocr" in plan.contents:
        pictures.append(sign(rng, sign_lines(rng, plan.contents["ocr"], plan.noise), plan.noise))
    order = rng.permutation(len(pictures))
    names = []
    for i in range(len(pictures)):
        suffix = "png" if rng.random() < 0.25 else "jpg"
        names.append(f"{MEDIA_FOLDER}/{plan.post_id}-{i}.{suffix}")
        write_picture(folder / names[-1], pictures[order[i]], int(rng.integers(82, 95)))
    return names


def _video(
    folder: Path, plan: PostPlan, rng: np.random.Generator, sounds: tuple[str, ...] | None
) -> list[str]:
    if "video" not in plan.contents:
        return []
    frames = clip(rng, plan.contents["video"], plan.noise)
    wave = None
    if sounds is not None:
        wave = sound(rng, sounds, FRAMES / FRAME_RATE_HZ, plan.noise)
    name = f"{MEDIA_FOLDER}/{plan.post_id}.mp4"
    write_video(folder / name, frames, FRAME_RATE_HZ, wave, SAMPLE_RATE_HZ)
    return [name]


def _sound(
    folder: Path, plan: PostPlan, rng: np.random.Generator, keys: tuple[str, ...] | None
) -> list[str]:
    if keys is None:
        return []
    suffix = "wav" if rng.random() < 0.5 else "ogg"
    name = f"{MEDIA_FOLDER}/{plan.post_id}.{suffix}"
    wave = sound(rng, keys, float(rng.uniform(1.95, 2.9)), plan.noise)
    write_sound(folder / name, wave, SAMPLE_RATE_HZ)
    return [name]


def make_posts(folder: Path, plans: Sequence[PostPlan], processes: int) -> Iterator[Entry]:
    """Make all posts in parallel, in the order of their plans, then write the data file.

    The folder's earlier demo media are replaced. The data file comes last: where it stands, all
    that it names is there.
    """
    data_file, media = folder / DATA_FILE, folder / MEDIA_FOLDER
    data_file.unlink(missing_ok=True)
    shutil.rmtree(media, ignore_errors=True)
    media.mkdir(parents=True)
    entries = []
    with process_pool(processes) as pool:
        for entry in pool.map(make_post, [folder] * len(plans), plans, chunksize=8):
            entries.append(entry)
            yield entry
    write_whole(data_file, json.dumps(entries, ensure_ascii=False, indent=1))
