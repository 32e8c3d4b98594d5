"""Measure this host with generated posts, and choose the numbers of its workers.

1. On a GPU, batches of each encoder are doubled while that gives more rows a second within a
   part of the device's memory.
2. The real pool, with a process of one thread for each stage, tags posts: the CPU of each process
   is the cost of its stage.
3. From the costs follow placements: each stage gets its share of the cores (`candidates`).
4. The candidates and the quick rule tag the same posts in turns. The fastest stays, the rule unless
   another is faster by more than the noise.

Posts are read from local files: what the King, the downloader and the database take is not in it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from common.processes import process_pool
from config.features import ExtractorName, FeatureSettings
from config.settings import ExtractorPlacement, Settings
from extractors.parts import PARTS, audio_encoder, visual_encoder
from workers.pool.placement import (
    ENCODERS,
    Host,
    Values,
    chosen,
    filled,
    group,
    quick_rule,
    slots_for,
)
from workers.post_run import PostTags
from workers.runner import PostRunner
from workers.sample_posts import SECONDS, Mix, SampleFiles, make_samples

_SHARE_OF_STAGES, _SHARE_OF_TURNS = 0.3, 0.6
"""Of the seconds: for the costs of stages, and for the turns of the candidates."""

LEAST_TURN_S = 4.0
"""A turn of a candidate. At half, the last post of a turn weighs too much; at double, a minute has
one turn of each, and other work on the machine decides."""
_LEAST_TURNS, _MOST_TURNS = 3, 9

_LEAST_GAIN, _SHARE_WON = 1.03, 0.75
"""Over the rule, of a candidate that is taken, in the median of the turns, and the share of turns
in which it must be the faster one: on a machine with other work, two turns of one and the same
placement differ by a third, and a median of three alone would take what is only lucky."""

_MEMORY_OF_MODELS = 0.5
"""Of the memory that is free, for all processes with models: the rest is for frames and files."""

_GPU_MEMORY = 0.4
"""Of a GPU's memory that one encoder's batch may take at its highest, weights included: encoders of
other modalities run one after another in the same process, and keep what they have allocated."""
_MOST_ROWS = 1024
_GAIN_OF_BATCH = 1.03

_IN_FLIGHT = 4
"""Average posts at once while costs are measured: batches form as under load, and the last ones
end soon."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Stage:
    """Hold what one stage takes for an average post.

    Attributes:
        cpu_ms: Of one core.
        memory_mb: Of its process.
    """

    name: str
    cpu_ms: float
    memory_mb: float


@dataclass(frozen=True, slots=True)
class BatchRate:
    """One size of batch on a device."""

    extractor: str
    rows: int
    rows_per_s: float
    memory_mb: float


@dataclass(frozen=True, slots=True)
class Trial:
    """One placement, and the posts a second of each of its turns."""

    name: str
    values: Values
    posts_per_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Tuning:
    """Everything that was measured, and the choice."""

    stages: tuple[Stage, ...]
    batches: tuple[BatchRate, ...]
    trials: tuple[Trial, ...]
    best: str

    @property
    def values(self) -> Values:
        """Return the settings that were chosen."""
        return next(trial.values for trial in self.trials if trial.name == self.best)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


@dataclass
class _Bench:
    """Posts that are run on a pool."""

    settings: Settings
    samples: SampleFiles
    mix: Mix
    number: int = 0
    pending: deque[list[Future[PostTags]]] = field(default_factory=deque)

    def submit(self, runner: PostRunner) -> None:
        """Begin an average post."""
        posts = self.samples.post(self.mix, self.number)
        self.number += 1
        self.pending.append([runner.submit(post) for post in posts])

    def end_one(self) -> None:
        """Wait for the oldest post; raises what one of its files failed with."""
        for future in self.pending.popleft():
            future.result()

    def run(self, runner: PostRunner, posts: int) -> float:
        """Run posts, as many at once as the pool takes; gives the seconds."""
        began = time.monotonic()
        for _ in range(posts):
            self.submit(runner)
        while self.pending:
            self.end_one()
        return time.monotonic() - began

    def runner(self, settings: Settings) -> PostRunner:
        """Return a runner with fusion where there is a bundle."""
        return PostRunner(settings, fuse=has_bundle(settings), limit=settings.media_in_work)


def has_bundle(settings: Settings) -> bool:
    """Tell whether there is a bundle, without which fusion is not measured."""
    return (settings.fusion.bundle / "bundle.yaml").is_file()


def steps(host: Host) -> int:
    """Return how many steps `tune` reports."""
    return 4 + bool(host.gpus)


def tune(
    settings: Settings, host: Host, mix: Mix, seconds: float, *, folder: Path, tell: Tell
) -> Tuning:
    """Measure, and choose.

    Args:
        settings: As the daemon's; what they name themselves stays.
        host: This one.
        mix: An average post.
        seconds: To measure; loading comes on top.
        folder: An empty one, for media and downloads.
        tell: Is told what begins.

    Raises:
        TaggingError: The workers cannot be started, or a post cannot be tagged.
    """
    tell("makes posts")
    fetch = settings.fetch.model_copy(update={"spool": folder / "spool"})
    cache = settings.cache.model_copy(update={"url": None})
    settings = settings.model_copy(update={"fetch": fetch, "cache": cache})
    bench = _Bench(settings, make_samples(folder, mix), mix)
    rates: list[BatchRate] = []
    if host.gpus:
        tell("finds sizes of batches")
        rates = _batch_rates(settings.features, "cuda:0")
    sizes = best_sizes(rates)
    batches = {name: {"batch_size": size} for name, size in sizes.items()}
    tell("measures each stage")
    stages, per_post_s = _stages(bench, host, seconds * _SHARE_OF_STAGES, batches)
    gpu_s = _gpu_s(settings.features, mix, rates)
    free_mb = psutil.virtual_memory().available / 2**20
    placements = candidates(settings, host, stages, gpu_s=gpu_s, free_mb=free_mb)
    values = {
        name: {**each, **({"features": batches} if name != "rule" and batches else {})}
        for name, each in placements.items()
    }
    tell(f"tries {len(values)} placements in turns")
    together = not host.gpus and _fit_together(values, stages, free_mb)
    trials = _trials(bench, values, per_post_s, seconds * _SHARE_OF_TURNS, together=together)
    tell("done")
    return Tuning(tuple(stages), tuple(rates), tuple(trials), best_of(trials))


def candidates(
    settings: Settings, host: Host, stages: Sequence[Stage], *, gpu_s: float, free_mb: float
) -> dict[str, Values]:
    """Return placements by name: the rule, and each stage by its share of the cores.

    ``processes`` has processes of one thread, which do not wait for each other; ``threads`` half as
    many of two, which hold half as many copies of the models. Names whose placement another has
    already are left out.
    """
    cost_s = {stage.name: stage.cpu_ms / 1000 for stage in stages}
    per_s = host.cpus / max(sum(cost_s.values()), 1e-6)
    if gpu_s and host.gpus:
        per_s = min(per_s, len(host.gpus) / gpu_s)
    encoders_mb = sum(stage.memory_mb for stage in stages if stage.name in ENCODERS)
    most = max(1, int(_MEMORY_OF_MODELS * free_mb / max(encoders_mb, 1)))

    def number(*names: str) -> int:
        # A thousandth is the rounding of the sums, and not one more process.
        needed = per_s * sum(cost_s.get(name, 0.0) for name in names)
        return max(1, math.ceil(needed - 0.001))

    rule = quick_rule(settings, host)
    placements: dict[str, Values] = {"rule": rule}
    for name, threads in (("processes", 1), ("threads", 2)):
        groups = []
        if host.gpus:
            groups += [e for e in rule["workers"]["extractors"] if "ocr" not in e["extractors"]]
        else:
            processes = min(number(*ENCODERS), most * threads)
            groups.append(_split("cpu", ENCODERS, processes, threads))
        if settings.features.ocr.enabled and not any(
            "ocr" in each["extractors"] for each in groups
        ):
            if host.gpus and settings.features.ocr.on_gpu:
                each = math.ceil(number("ocr") / len(host.gpus))
                groups += [group(f"cuda:{i}", ("ocr",), each, 1) for i in range(len(host.gpus))]
            else:
                groups.append(_split("cpu", ("ocr",), number("ocr"), threads))
        values = {
            "decode": {"processes": number("decode")},
            "workers": {"extractors": groups, "slots": slots_for(settings, host)},
        }
        if all(values["workers"] != each["workers"] for each in placements.values()):
            placements[name] = values
    return placements


def _split(device: str, names: Sequence[str], cores: int, threads: int) -> dict[str, Any]:
    """Return a group that uses this many cores; one core has one thread."""
    threads = min(threads, cores)
    return group(device, names, math.ceil(cores / threads), threads)


def best_of(trials: Sequence[Trial]) -> str:
    """Return the name of the fastest; the rule unless another is faster by more than the noise.

    Turns are compared with the rule's of the same round, so that other work on the machine, which
    comes and goes, tells against both. Fewer than three rounds prove nothing.
    """
    rule = next(trial for trial in trials if trial.name == "rule")
    gains = {"rule": 1.0}
    for trial in trials:
        pairs = zip(trial.posts_per_s, rule.posts_per_s, strict=True)
        ratios = [one / other for one, other in pairs]
        won = sum(ratio > 1 for ratio in ratios)
        gain = statistics.median(ratios)
        proven = len(ratios) >= _LEAST_TURNS and won >= _SHARE_WON * len(ratios)
        if proven and gain >= _LEAST_GAIN:
            gains[trial.name] = gain
    return max(gains, key=lambda name: gains[name])


def best_sizes(rates: Sequence[BatchRate]) -> dict[str, int]:
    """Return for each extractor the smallest batch that is as fast as the fastest, nearly."""
    sizes: dict[str, int] = {}
    for name in dict.fromkeys(rate.extractor for rate in rates):
        own = [rate for rate in rates if rate.extractor == name]
        fastest = max(rate.rows_per_s for rate in own)
        sizes[name] = min(r.rows for r in own if r.rows_per_s * _GAIN_OF_BATCH >= fastest)
    return sizes


def rising_rates(
    name: str, measure: Callable[[int], tuple[float, float]], first: int, budget_mb: float
) -> list[BatchRate]:
    """Double a batch while that is faster and fits.

    Args:
        name: Of the extractor.
        measure: Gives rows a second and megabytes of a batch of that many rows.
        first: The first size.
        budget_mb: A batch that takes more is not taken, unless it is the first.
    """
    rates: list[BatchRate] = []
    rows = first
    while rows <= max(first, _MOST_ROWS):
        try:
            per_s, memory_mb = measure(rows)
        except RuntimeError as error:
            if not rates or "memory" not in str(error).lower():
                raise
            break
        if rates and memory_mb > budget_mb:
            break
        faster = not rates or per_s > _GAIN_OF_BATCH * rates[-1].rows_per_s
        rates.append(BatchRate(name, rows, round(per_s, 2), round(memory_mb, 1)))
        if not faster:
            break
        rows *= 2
    return rates


def rows_of_post(features: FeatureSettings, mix: Mix) -> dict[ExtractorName, int]:
    """Return the rows that an average post gives each encoder, at most."""
    sound = audio_encoder(features.audio).sound
    per_sound = math.ceil(SECONDS / sound.row_s)
    return {
        "video": mix.videos * features.video.frames,
        "image": mix.images * features.image.views,
        "audio": (mix.videos + mix.audios) * per_sound,
        "text": 1,
    }


def _gpu_s(features: FeatureSettings, mix: Mix, rates: Sequence[BatchRate]) -> float:
    """Return the seconds of a GPU for an average post."""
    fastest: defaultdict[str, float] = defaultdict(float)
    for rate in rates:
        fastest[rate.extractor] = max(fastest[rate.extractor], rate.rows_per_s)
    return sum(
        rows / fastest[name] for name, rows in rows_of_post(features, mix).items() if fastest[name]
    )


def _batch_rates(features: FeatureSettings, device: str) -> list[BatchRate]:
    with process_pool(1, _quiet) as pool:
        return pool.submit(measure_batches, features, device).result()


def _quiet() -> None:
    from common.logs import configure_logs

    configure_logs("json", "error")


def measure_batches(features: FeatureSettings, device: str) -> list[BatchRate]:
    """Measure sizes of batches of each encoder on a device, in this process."""
    import torch

    from extractors.suite import ExtractorSuite

    on_gpu = device != "cpu"
    budget_mb = math.inf
    if on_gpu:
        budget_mb = _GPU_MEMORY * torch.cuda.mem_get_info(device)[1] / 2**20
    rates: list[BatchRate] = []
    names: list[ExtractorName] = ["video", "image", "audio", "text"]
    if visual_encoder(features.video).clips:
        names.remove("video")  # its batches are counted in clips
    for name in names:
        suite = ExtractorSuite(features, device, (name,))
        suite.load()

        def measure(
            rows: int, suite: ExtractorSuite = suite, name: ExtractorName = name
        ) -> tuple[float, float]:
            items = _rows(features, name, rows)
            suite.set_batch_size(name, rows)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            suite.run(name, items)
            times = []
            for _ in range(3):
                began = time.perf_counter()
                suite.run(name, items)
                times.append(time.perf_counter() - began)
            peak = torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else 0.0
            return rows / statistics.median(times), peak

        first = int(getattr(features, name).batch_size)
        rates += rising_rates(name, measure, first, budget_mb)
        suite.close()
    return rates


def _rows(features: FeatureSettings, name: ExtractorName, rows: int) -> list[Any]:
    """Return items of an extractor that are one batch together."""
    chance = np.random.default_rng(0)
    if name == "text":
        words = [f"word{i}" for i in range(1000)]
        return [" ".join(chance.choice(words, 20)) for _ in range(rows)]
    [part] = [spec for spec in PARTS.values() if spec.modality == name]
    row = part.row(features)
    if row.dtype == "uint8":
        return [chance.integers(0, 256, (rows, *row.shape), np.uint8)]
    return [chance.standard_normal((rows, *row.shape), np.float32)]


def _stages(
    bench: _Bench, host: Host, seconds: float, batches: Mapping[str, Mapping[str, int]]
) -> tuple[list[Stage], float]:
    """Return the cost of each stage, and the seconds of a post, with a process for each stage."""
    settings = bench.settings
    device = "cuda:0" if host.gpus else "cpu"
    on_device = {*ENCODERS} | ({"ocr"} if settings.features.ocr.on_gpu else set())
    names = [name for name in (*ENCODERS, "ocr") if settings.features.runs(name)]  # type: ignore[arg-type]
    groups = [group(device if n in on_device else "cpu", (n,), 1, 1) for n in names]
    workers = settings.workers.model_copy(
        update={"extractors": tuple(map(ExtractorPlacement.model_validate, groups))}
    )
    decode = settings.decode.model_copy(update={"processes": 1})
    features = filled(settings, chosen({"features": batches}, "batches")).features
    alone = settings.model_copy(update={"workers": workers, "decode": decode, "features": features})
    with bench.runner(alone) as runner:
        before, done, took_s = _used(runner), 1, bench.run(runner, 1)
        # Models allocate in their first passes: these count only where a post takes all the time,
        # as with large models on a CPU.
        if took_s < seconds:
            before, began = _used(runner), time.monotonic()
            done = _run_for(bench, runner, seconds)
            took_s = time.monotonic() - began
        after = _used(runner)
        memory = {n: psutil.Process(pid).memory_info().rss / 2**20 for n, pid in _pids(runner)}
    stages = [
        Stage(name, round(1000 * (s - before.get(name, 0.0)) / done, 2), round(memory[name]))
        for name, s in after.items()
        if name != "fetch"
    ]
    return stages, took_s / done


def _run_for(bench: _Bench, runner: PostRunner, seconds: float) -> int:
    """Run posts for some seconds; gives their number."""
    end, done = time.monotonic() + seconds, 0
    while time.monotonic() < end or not done:
        while len(bench.pending) < _IN_FLIGHT:
            bench.submit(runner)
        bench.end_one()
        done += 1
    while bench.pending:
        bench.end_one()
        done += 1
    return done


def _pids(runner: PostRunner) -> Iterator[tuple[str, int]]:
    """Yield stage and process of each worker, where each stage has one."""
    for view in runner.workers:
        if view.pid is not None:
            yield view.extractors[0] if view.extractors else view.role, view.pid


def _used(runner: PostRunner) -> dict[str, float]:
    """Return the CPU seconds of each worker until now."""
    return {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in _pids(runner)}


def _fit_together(values: Mapping[str, Values], stages: Sequence[Stage], free_mb: float) -> bool:
    """Tell whether the pools of all placements fit into the memory at once."""
    memory = {stage.name: stage.memory_mb for stage in stages}
    needed = sum(
        each["processes"] * sum(memory.get(name, 0.0) for name in each["extractors"])
        for placement in values.values()
        for each in placement["workers"]["extractors"]
    )
    return bool(needed <= _MEMORY_OF_MODELS * free_mb)


def _trials(
    bench: _Bench,
    values: Mapping[str, Values],
    per_post_s: float,
    seconds: float,
    *,
    together: bool,
) -> list[Trial]:
    """Let placements tag the same posts, in turns where their models fit side by side."""
    posts = max(1, round(LEAST_TURN_S / per_post_s))
    rounds = int(seconds / (len(values) * posts * per_post_s))
    # With models that take most of the time for one post, more seconds must be asked for.
    least = _LEAST_TURNS if len(values) * per_post_s < seconds else 1
    rounds = max(least, min(_MOST_TURNS, rounds))
    speeds: defaultdict[str, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        runners: dict[str, PostRunner] = {}
        for i in range(rounds if together else 1):
            # Every other round runs backwards, so that the order does not matter.
            for name in list(values)[:: 1 if i % 2 == 0 else -1]:
                if name not in runners:
                    if not together:
                        stack.close()
                    placed = filled(bench.settings, chosen(values[name], name))
                    runners[name] = stack.enter_context(bench.runner(placed))
                    bench.run(runners[name], 1)
                for _ in range(1 if together else rounds):
                    bench.number = i  # the same posts for each
                    speeds[name].append(posts / bench.run(runners[name], posts))
    return [
        Trial(name, each, tuple(round(speed, 4) for speed in speeds[name]))
        for name, each in values.items()
    ]
