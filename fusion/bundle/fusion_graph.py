"""A bundle's fusion model, or ensemble, as a graph for `fusion.bundle.export`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from common.post import Stream
from fusion.bundle.bundle import Bundle
from fusion.bundle.export import Graph, Inputs, Port
from fusion.data.collate import Batch


class FusionScores(nn.Module):
    """A bundle's model, or ensemble, with tensors for inputs; its scores before calibration."""

    def __init__(self, model: nn.Module, streams: Sequence[Stream]) -> None:
        super().__init__()
        self.model, self.streams = model, tuple(streams)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Score posts.

        Args:
            *inputs: Tokens float32 ``(posts, n, dim)`` and mask bool ``(posts, n)`` of each stream
                in turn.

        Returns:
            float32 ``(posts, classes)`` in [0, 1].
        """
        tokens = dict(zip(self.streams, inputs[::2], strict=True))
        masks = dict(zip(self.streams, inputs[1::2], strict=True))
        scores: torch.Tensor = torch.sigmoid(self.model(Batch((), tokens, masks)))
        return scores


def fusion_graph(bundle: Bundle) -> Graph:
    """Return a bundle's graph: a stream's tokens under its name, its mask as ``<stream>_mask``.

    A stream that a post does not have is a mask of False over one token of anything.
    """
    dims, most = bundle.schema.dims, bundle.schema.tokens
    ports: list[Port] = []
    for stream in dims:
        length = f"{stream}_tokens"
        for name in (stream, f"{stream}_mask"):
            ports.append(Port(name, {0: "posts", 1: length}, {length: most[stream]}))
    calibration = bundle.calibration
    return Graph(
        module=FusionScores(bundle.model, tuple(dims)).eval(),
        legacy=bundle.model,
        ports=tuple(ports),
        output="scores",
        example=_tokens(bundle, 2, {s: 2 + i for i, s in enumerate(dims)}, seed=0),
        cases=_fusion_cases(bundle),
        about={
            "bundle": bundle.name,
            "version": bundle.version,
            "labels": bundle.labels.as_json(),
            "thresholds": [float(t) for t in bundle.thresholds],
            "calibration": calibration.model_dump(mode="json") if calibration else None,
            "scores": "sigmoid of the logits; calibrate them, then compare with the thresholds",
            "features": {s: {"dim": d, "tokens": most[s]} for s, d in bundle.schema.dims.items()},
            "fingerprints": dict(bundle.manifest.fingerprints),
            "image_as_frames": bundle.manifest.image_as_frames,
            "ocr_mode": bundle.manifest.ocr_mode,
        },
    )


def _fusion_cases(bundle: Bundle) -> dict[str, Inputs]:
    dims, most = bundle.schema.dims, bundle.schema.tokens
    one = dict.fromkeys(dims, 1)
    some = {s: min(most[s], 3 + 2 * i) for i, s in enumerate(dims)}
    cases: dict[str, Inputs] = {
        "one post, one token each": _tokens(bundle, 1, one, seed=1),
        "one post": _tokens(bundle, 1, some, seed=2),
        "many posts, padded": _tokens(bundle, 7, some, seed=3),
        "as many tokens as allowed": _tokens(bundle, 2, dict(most), seed=4),
        "nothing at all": _tokens(bundle, 2, one, seed=5, without=tuple(dims)),
    }
    for stream in dims:
        cases[f"no {stream}"] = _tokens(bundle, 3, some, seed=6, without=(stream,))
    return cases


def _tokens(
    bundle: Bundle,
    posts: int,
    counts: Mapping[Stream, int],
    *,
    seed: int,
    without: Sequence[Stream] = (),
) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    inputs: list[torch.Tensor] = []
    for stream, dim in bundle.schema.dims.items():
        count = counts[stream]
        lengths = torch.randint(1, count + 1, (posts, 1), generator=chance)
        lengths[0] = count
        if stream in without:
            lengths.zero_()
        mask = torch.arange(count)[None, :] < lengths  # (posts, n)
        tokens = torch.randn(posts, count, dim, generator=chance)
        inputs += [tokens * mask[:, :, None], mask]
    return inputs
