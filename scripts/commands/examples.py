"""Examples in the help of each command, without ``insighttag`` and the command before them."""

from __future__ import annotations

from collections.abc import Mapping

_EXTRACT = ("--input work/posts.jsonl --features work/features",)

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "init": ("mine", "mine --preset modern"),
    "train": (
        "pictures/ --labels labels.csv --out mine",
        "posts.jsonl --out mine --set trainer.epochs=5",
    ),
    "tag": (
        "pictures/ --out tags.jsonl --bundle mine/bundle",
        "picture.jpg --bundle mine/bundle --json",
    ),
    "inspect": ("picture.jpg", "clip.mp4 --out frames"),
    "doctor": ("--config mine/settings.yaml", "--json"),
    "pull": (
        "--since 30d --out work/posts.jsonl",
        """--query '{"lang": "en"}' --min-posts-per-tag 50 --out work/posts.jsonl""",
    ),
    "download": ("work/posts.jsonl --out work/media --per-host 16",),
    "analyze": ("work/posts.jsonl --media work/media --out work/analysis",),
    "extract image": _EXTRACT,
    "extract video": _EXTRACT,
    "extract audio": _EXTRACT,
    "extract text": _EXTRACT,
    "label-map": ("--input work/posts.jsonl --min-posts 20 --out work/tags.json",),
    "build": (
        "--input work/posts.jsonl --features work/features --labels work/tags.json --out data",
    ),
    "weights list": ("--preset small", "--config mine/settings.yaml"),
    "weights get": ("small", "modern --out FOLDER"),
    "weights verify": ("--preset small",),
    "train-net": ("--config config/train_config.yaml --epochs 20", "--resume runs"),
    "infer": ("--input data/test.json --bundle mine/bundle --out tags.jsonl",),
    "tune": ("--config config/train_config.yaml --trials 20",),
    "zeroshot": ("--tags tags.yaml --out workshop/weights/new",),
    "out-of-fold": ("--model-config image.yaml --features work/features",),
    "bundle rollback": ("workshop/weights/earlier",),
    "bundle thresholds": (
        "workshop/weights/insight",
        "workshop/weights/insight --set cat=0.4 --set dog=0.55",
    ),
    "bundle add-tags": ("workshop/weights/new --tags more.yaml --out workshop/weights/more",),
    "export": ("--bundle mine/bundle --out model.onnx",),
    "work": ("--config mine/settings.yaml", "--config mine/settings.yaml --drain"),
    "serve": ("--config mine/settings.yaml --port 8080",),
    "publish": ("POST_ID OTHER_ID", "--file ids.txt --priority 5", "--untagged"),
    "retag": ("--bundle-older-than current",),
    "status": ("--json",),
    "top": ("--config mine/settings.yaml", "--once --json"),
    "show": ("POST_ID",),
    "dead list": ("--json",),
    "dead show": ("POST_ID",),
    "dead replay": ("POST_ID", "--all"),
    "dead drop": ("POST_ID",),
    "labels check": ("work/tags.json --data data/train.json",),
    "labels rename": ("work/tags.json cats cat",),
    "labels merge": ("work/tags.json car cars --into car",),
    "labels split": ("work/tags.json pets --into cats --into dogs",),
    "labels retire": ("work/tags.json misc",),
    "labels history": ("work/tags.json",),
    "labels apply": ("work/tags.json --data data/train.json",),
    "cache stats": ("--json",),
    "cache prune": ("--max-mb 1000",),
    "cache clear": ("--yes",),
    "services start": ("",),
    "services stop": ("",),
    "services status": ("--json",),
}
