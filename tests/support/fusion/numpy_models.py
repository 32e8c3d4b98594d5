"""The fusion models again, in plain numpy: one post at a time, no batch, no padding, no masks.

Written from the definitions, in float64; they take a model's state_dict and give own heads too.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from common.post import Features

Array = Any  # float64
Weights = dict[str, Array]
Said = tuple[Array, dict[str, Array]]
STREAMS = ("video", "video_lstm", "image", "audio", "text", "ocr")
MOVING, ORDERED = ("video", "audio"), ("video", "audio", "text", "ocr")


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array, axis: int) -> Array:
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def linear(w: Weights, name: str, x: Array) -> Array:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def layer_norm(w: Weights, name: str, x: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return normed * w[f"{name}.weight"] + w[f"{name}.bias"]


def batch_norm(w: Weights, name: str, x: Array) -> Array:
    """As learned."""
    normed = (x - w[f"{name}.running_mean"]) / np.sqrt(w[f"{name}.running_var"] + 1e-5)
    return normed * w[f"{name}.weight"] + w[f"{name}.bias"]


def known(w: Weights) -> list[str]:
    """The streams that a model has."""
    return [s for s in STREAMS if f"missing.{s}" in w or f"pool.missing.{s}" in w]


def rows_of(post: Features, modality: str) -> Array | None:
    rows = post.arrays.get(modality)  # type: ignore[call-overload]
    return None if rows is None else rows.astype(np.float64)


def each(
    post: Features, streams: Iterable[str], vector: Callable[[str, Array], Array]
) -> dict[str, Array]:
    """A vector of each of some streams that the post has."""
    rows = {m: rows_of(post, m) for m in streams}
    return {m: vector(m, x) for m, x in rows.items() if x is not None}


def filled(w: Weights, alone: dict[str, Array], prefix: str = "") -> list[Array]:
    """The vectors of all streams: for those that are missing, what stands for them."""
    return [alone[m] if m in alone else w[f"{prefix}missing.{m}"] for m in known(w)]


def squeeze_excite(w: Weights, name: str, x: Array) -> Array:
    squeezed = relu(batch_norm(w, f"{name}.norm", linear(w, f"{name}.squeeze", x)))
    return x * sigmoid(linear(w, f"{name}.excite", squeezed))


def own_heads(w: Weights, alone: dict[str, Array]) -> dict[str, Array]:
    return {m: linear(w, f"own.{m}", v) for m, v in alone.items() if f"own.{m}.weight" in w}


def mean_pooled(w: Weights, post: Features) -> tuple[list[Array], dict[str, Array]]:
    def vector(m: str, x: Array) -> Array:
        mean = layer_norm(w, f"pool.norms.{m}", x).mean(axis=0)
        return linear(w, f"pool.projections.{m}", mean)

    alone = each(post, known(w), vector)
    return filled(w, alone, "pool."), alone


def concat_mlp(w: Weights, post: Features) -> Said:
    vectors, alone = mean_pooled(w, post)
    x = relu(np.concatenate(vectors))
    for i in range(2):
        x = relu(linear(w, f"hidden.{i}", x))
    return linear(w, "classify", x), own_heads(w, alone)


def nextvlad(w: Weights, name: str, x: Array) -> Array:
    """Written as the sum over frames, groups and clusters that the paper has."""
    centres = w[f"{name}.centres"]  # (K, λN/G)
    clusters, narrow = centres.shape
    wide = linear(w, f"{name}.expand", x)
    groups = wide.shape[1] // narrow
    attention = sigmoid(linear(w, f"{name}.attend", wide))
    assigned = batch_norm(w, f"{name}.norm_assign", linear(w, f"{name}.assign", wide))
    total = np.zeros((clusters, narrow))
    for frame in range(len(x)):
        for group in range(groups):
            piece = wide[frame, group * narrow : (group + 1) * narrow]
            chances = softmax(assigned[frame, group * clusters : (group + 1) * clusters], 0)
            for k in range(clusters):
                total[k] += attention[frame, group] * chances[k] * (piece - centres[k])
    total /= np.sqrt((total**2).sum(axis=1, keepdims=True))
    return batch_norm(w, f"{name}.norm", total.ravel())


def vlad_or_mean(w: Weights, m: str, x: Array) -> Array:
    normed = layer_norm(w, f"norms.{m}", x)
    clustered = f"vlads.{m}.centres" in w
    return nextvlad(w, f"vlads.{m}", normed) if clustered else normed.mean(axis=0)


def concat_se(w: Weights, post: Features) -> Said:
    alone = each(post, known(w), lambda m, x: linear(w, f"projections.{m}", vlad_or_mean(w, m, x)))
    gated = squeeze_excite(w, "gate", linear(w, "join", np.concatenate(filled(w, alone))))
    return linear(w, "classify", gated), own_heads(w, alone)


def nextvlad_se(w: Weights, post: Features) -> Said:
    assert "vlads.video_lstm.centres" not in w, "one vector of a whole video has no clusters"
    alone = each(post, known(w), lambda m, x: vlad_or_mean(w, m, x))
    joined = batch_norm(w, "norm", linear(w, "join", np.concatenate(filled(w, alone))))
    return linear(w, "classify", squeeze_excite(w, "gate", joined)), own_heads(w, alone)


def gmu(w: Weights, post: Features) -> Said:
    vectors, alone = mean_pooled(w, post)
    gates = linear(w, "gates", np.concatenate(vectors)).reshape(len(vectors), -1)
    present = [i for i, m in enumerate(known(w)) if m in alone] or list(range(len(vectors)))
    weights = softmax(gates[present], 0)
    fused = sum(weights[k] * np.tanh(vectors[i]) for k, i in enumerate(present))
    return linear(w, "classify", relu(linear(w, "hidden", fused))), own_heads(w, alone)


def lstm(w: Weights, name: str, x: Array) -> Array:
    """Gates in torch's order: input, forget, cell, output."""
    size = w[f"{name}.weight_hh_l0"].shape[1]
    state = cell = np.zeros(size)
    states = []
    for row in x:
        gates = w[f"{name}.weight_ih_l0"] @ row + w[f"{name}.bias_ih_l0"]
        gates = gates + w[f"{name}.weight_hh_l0"] @ state + w[f"{name}.bias_hh_l0"]
        i, f, g, o = np.split(gates, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        state = sigmoid(o) * np.tanh(cell)
        states.append(state)
    return np.stack(states)


def attention_lstm(w: Weights, post: Features) -> Said:
    def branch(m: str, x: Array) -> Array:
        name = f"branches.{m}"
        x = np.tanh(linear(w, f"{name}.project", layer_norm(w, f"{name}.norm", x)))
        back = lstm(w, f"{name}.back", x[::-1])[::-1]
        states = np.concatenate([lstm(w, f"{name}.ahead", x), back], axis=1)
        weights: Array = softmax(linear(w, f"{name}.attend", states)[:, 0], 0)
        return weights @ states

    alone = each(post, known(w), branch)
    x = np.tanh(linear(w, "narrow", relu(linear(w, "join", np.concatenate(filled(w, alone))))))
    return linear(w, "classify", x), own_heads(w, alone)


def place(position: int, width: int) -> Array:
    half = (width + 1) // 2
    angles = position / 10_000 ** (np.arange(half) / half)
    return np.concatenate([np.sin(angles), np.cos(angles)])[:width]


def block(w: Weights, name: str, x: Array, heads: int = 4) -> Array:
    width = x.shape[1]
    size = width // heads
    qkv = linear(w, f"{name}.qkv", layer_norm(w, f"{name}.norm_attention", x))
    joined = np.zeros_like(x)
    for head in range(heads):
        q, k, v = (
            qkv[:, i * width + head * size : i * width + (head + 1) * size] for i in range(3)
        )
        joined[:, head * size : (head + 1) * size] = softmax(q @ k.T / math.sqrt(size), 1) @ v
    x = x + linear(w, f"{name}.out", joined)
    y = linear(w, f"{name}.feed.0", layer_norm(w, f"{name}.norm_feed", x))
    erf = np.vectorize(math.erf)
    return x + linear(w, f"{name}.feed.3", y * 0.5 * (1 + erf(y / math.sqrt(2))))


def projected(w: Weights, m: str, rows: Array) -> tuple[Array, Array]:
    """Tokens without and with their positions."""
    normed = layer_norm(w, f"projections.{m}.norm", rows)
    tokens = linear(w, f"projections.{m}.project", normed)
    if m in MOVING:
        steps = np.concatenate([np.zeros_like(normed[:1]), normed[1:] - normed[:-1]])
        tokens = tokens + linear(w, f"projections.{m}.change", steps)
    if m not in ORDERED:
        return tokens, tokens
    places = np.stack([place(i, tokens.shape[1]) for i in range(len(tokens))])
    return tokens, tokens + w[f"scales.{m}"] * places


def one_sequence(w: Weights, post: Features) -> tuple[Array, dict[str, Array]]:
    """Tokens of all streams, or what stands for them, and the mean of each stream's own."""
    sequence, alone = [], {}
    for m in known(w):
        rows = rows_of(post, m)
        tokens = w[f"missing.{m}"][None]
        if rows is not None:
            plain, tokens = projected(w, m, rows)
            alone[m] = plain.mean(axis=0)
        sequence.append(tokens + w[f"kinds.{m}"])
    return np.concatenate(sequence), alone


def token_transformer(w: Weights, post: Features) -> Said:
    rows, alone = one_sequence(w, post)
    x = np.concatenate([w["start"][None], rows])
    for i in range(2):
        x = block(w, f"blocks.{i}", x)
    return linear(w, "classify", layer_norm(w, "norm", x[0])), own_heads(w, alone)


def mbt(w: Weights, post: Features) -> Said:
    streams = {}
    for m in known(w):
        rows = rows_of(post, m)
        tokens = w[f"missing.{m}"][None] if rows is None else projected(w, m, rows)[1]
        streams[m] = np.concatenate([w[f"starts.{m}"][None], tokens])
    streams = {m: block(w, f"blocks.0.{m}", x) for m, x in streams.items()}
    alone = {m: x[0] for m, x in streams.items() if m in post.arrays}
    shared = w["bottlenecks"]
    for i in (1, 2):
        mixed = {
            m: block(w, f"blocks.{i}.{m}", np.concatenate([shared, x])) for m, x in streams.items()
        }
        shared = np.mean([x[: len(shared)] for x in mixed.values()], axis=0)
        streams = {m: x[len(shared) :] for m, x in mixed.items()}
    speak = list(alone) or known(w)
    said = [linear(w, "classify", layer_norm(w, f"norms.{m}", streams[m][0])) for m in speak]
    return np.mean(said, axis=0), own_heads(w, alone)


def ml_decoder(w: Weights, post: Features) -> Said:
    rows, alone = one_sequence(w, post)
    tokens = layer_norm(w, "norm_tokens", rows)
    asking = layer_norm(w, "norm_queries", 2 * w["queries"])
    width, heads = tokens.shape[1], 4
    keys, values = np.split(linear(w, "answer", tokens), 2, axis=1)
    mixed = np.zeros_like(asking)
    for part in np.split(np.arange(width), heads):
        query = linear(w, "ask", asking)[:, part]
        chances = softmax(query @ keys[:, part].T / math.sqrt(len(part)), 1)
        mixed[:, part] = chances @ values[:, part]
    x = layer_norm(w, "norm_attention", asking + linear(w, "out", mixed))
    fed = linear(w, "feed.3", relu(linear(w, "feed.0", x)))
    x = layer_norm(w, "norm_feed", x + fed)
    said = np.concatenate([x[k] @ w["classify.weight"][k] for k in range(len(x))])
    bias = w["classify.bias"]
    return said[: len(bias)] + bias, own_heads(w, alone)


def late(w: Weights, post: Features) -> Said:
    streams = [s for s in STREAMS if f"own.{s}.weight" in w]
    means = each(post, streams, lambda m, x: layer_norm(w, f"norms.{m}", x).mean(axis=0))
    said = own_heads(w, means) or {m: w[f"own.{m}.bias"] for m in streams}
    weights = softmax(np.stack([w["mixing"][streams.index(m)] for m in said]), 0)
    logits = (weights * np.stack(list(said.values()))).sum(axis=0)
    return logits, said if means else {}


def linear_probe(w: Weights, post: Features) -> Said:
    means = {s: w[f"centres.{s}.mean"] for s in STREAMS if f"centres.{s}.mean" in w}
    alone = each(post, means, lambda m, x: (x.mean(axis=0) - means[m]) * w[f"centres.{m}.scale"])
    joined = [alone.get(m, np.zeros_like(mean)) for m, mean in means.items()]
    logits = linear(w, "classify", np.concatenate(joined))
    if any(key.startswith("each.") for key in w):
        said = [logits, *(linear(w, f"each.{m}", x) for m, x in alone.items())]
        score = np.mean([sigmoid(x) for x in said], axis=0)
        logits = np.log(score / (1 - score))
    return logits, own_heads(w, alone)


def knn(w: Weights, post: Features) -> Said:
    streams = [s for s in STREAMS if f"vectors_{s}" in w]

    def unit(m: str, x: Array) -> Array:
        away = (x.mean(axis=0) - w[f"centres.{m}.mean"]) * w[f"centres.{m}.scale"]
        return away / np.linalg.norm(away)

    alone, logits, prior = each(post, streams, unit), w["bias"].copy(), w["prior"]
    for m, vector in alone.items():
        if not len(w["truth"]):
            continue
        cosines = w[f"vectors_{m}"] @ vector
        nearest = np.argsort(-cosines)[: int(w["neighbours"])]
        votes = softmax(cosines[nearest] / w["temperature"], 0)
        truth = w["truth"][w[f"posts_{m}"][nearest].astype(int)]
        share = (len(nearest) * votes @ truth + sigmoid(prior)) / (len(nearest) + 1)
        logits += w["mixing"][streams.index(m)] * (np.log(share / (1 - share)) - prior)
    return logits, own_heads(w, alone)


def tag_text(w: Weights, post: Features) -> Said:
    streams = [s for s in STREAMS if f"centre_{s}" in w]

    def unit(m: str, x: Array) -> Array:
        mean = (x / np.linalg.norm(x, axis=1, keepdims=True)).mean(axis=0)
        away = mean / np.linalg.norm(mean) - w[f"centre_{m}"]
        return away / np.linalg.norm(away)

    means = each(post, streams, unit)
    if not means:
        return w["bias"], {}
    weights = softmax(np.stack([w["mixing"][streams.index(m)] for m in means]), 0)
    said = [w[f"vectors.{m}"] @ vector for m, vector in means.items()]
    logits = w["scale"] * (weights * np.stack(said)).sum(axis=0) + w["bias"]
    return logits, own_heads(w, means)


_ALL = (token_transformer, concat_mlp, concat_se, gmu, nextvlad_se, attention_lstm, mbt, ml_decoder)
FORWARDS: dict[str, Callable[[Weights, Features], Said]] = {
    forward.__name__: forward for forward in (*_ALL, late, linear_probe, knn, tag_text)
}
