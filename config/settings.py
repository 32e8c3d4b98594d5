"""Typed, frozen settings of the daemon, the commands and `infer_net.py`; units are in the names.

Loaded once by `config.load.load_settings` and passed in; nothing reads settings at import.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from common.retry import RetryPolicy
from common.urls import collection_of, is_database, redact, split_address
from config.features import ExtractorName, FeatureSettings
from config.section import PositiveInt, Seconds, Section

Count = Annotated[int, Field(ge=0)]
MIB = 1024 * 1024
_HTTP_URL = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[^\s/:\[\]]+)(:[0-9]+)?(/\S*)?")
HostName = Annotated[str, Field(pattern=r"^[^\s/:]+$")]


class BrokerSettings(Section):
    """The message queue."""

    url: str = "embedded://"
    queue: str = "insighttag.posts"
    prefetch: PositiveInt | Literal["auto"] = "auto"
    """Messages held unacknowledged: the daemon's whole intake. With ``auto`` four for each media
    file that can be in work (``workers.slots``, ``decode.processes``, ``fetch.connections``), and
    while messages pass quickly as many as were acknowledged in half a second, up to 512."""
    heartbeat_s: PositiveInt = 10
    socket_timeout_s: Seconds = 5
    visibility_timeout_s: Seconds = 60
    """Redis only: messages of a consumer that is silent for this long are delivered again."""
    delivery_limit: PositiveInt = 20
    """RabbitMQ only: deliveries after which the broker itself dead-letters a message."""

    @field_validator("prefetch", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        # pydantic would name both members of the union, as if they were keys.
        if value == "auto" or re.fullmatch("0*[1-9][0-9]*", str(value)):
            return value
        raise ValueError("Input should be an integer of at least 1, or auto")

    @field_validator("url")
    @classmethod
    def _scheme(cls, value: str) -> str:
        # `king.broker.connect.BROKERS` alone knows which schemes there are.
        if not re.match(r"[a-z][a-z0-9+.-]*://", value):
            raise ValueError(
                f"{redact(value)!r} is not a broker URL; use a URL like amqp://, redis:// or embedded://"
            )
        return value


class FieldMap(Section):
    """Our names -> the platform's dotted paths in a post document."""

    id: str = "_id"
    text: str = "text"
    images: str = "images"
    videos: str = "videos"
    audios: str = "audios"
    labels: str = "labels"
    author: str | None = None
    """Author of the post: `scripts/build_trainval_data.py` keeps an author on one side."""
    created: str | None = None
    """Creation time of the post, for `monitor`, `pull_posts`: a date, ISO text, or Unix seconds."""


class StoreSettings(Section):
    """MongoDB: where posts are read and tags are written."""

    url: str = "embedded://"
    database: str = "insighttag"
    collection: str = "posts"
    jobs_collection: str = "jobs"
    fields: FieldMap = FieldMap()
    result_path: str = "insight"
    """The sub-document of a post that tags are written to."""
    timeout_s: Seconds = 10
    batch_size: PositiveInt = 200

    @field_validator("url")
    @classmethod
    def _scheme(cls, value: str) -> str:
        if not value.startswith(("mongodb://", "mongodb+srv://", "embedded://")):
            raise ValueError(f"{redact(value)!r} is not a database; use mongodb:// or embedded://")
        return value


class FetchSettings(Section):
    """Limits of the downloader, the only process that opens post URLs."""

    connections: PositiveInt = 16
    connect_timeout_s: Seconds = 5
    read_timeout_s: Seconds = 15
    total_timeout_s: Seconds = 60
    max_bytes: PositiveInt = 200 * 1024 * 1024
    max_redirects: Annotated[int, Field(ge=0)] = 5
    max_media: PositiveInt = 20
    """Media of one post; those beyond it are left out and named in the log."""
    allow_private_hosts: bool = False
    spool: Path = Path("workshop/spool")
    user_agent: str = "InsightTag/1"


class DecodeSettings(Section):
    """Decoder processes and what a media file may be."""

    processes: PositiveInt = 2
    deadline_s: Seconds = 60
    memory_mb: PositiveInt = 4096
    """Address space that one decoder may grow by; past it, the decoder is replaced."""
    max_pixels: PositiveInt = 100_000_000
    max_duration_s: Seconds = 3600
    """Longer videos and sounds are read up to here."""
    max_audio_s: Seconds = 300
    """Sound of one file that is turned into patches."""
    hwaccel: Literal["none", "cuda"] = "none"
    """``cuda``: an NVIDIA GPU decodes long videos of large pictures, and the CPU those that it does
    not decode. Never run on a GPU; docs/media.md"""


class ExtractorPlacement(Section):
    """One group of extractor processes: a device and the extractors that it hosts."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$")] = "cpu"
    extractors: tuple[ExtractorName, ...] = ("video", "image", "audio", "text", "ocr", "asr")
    processes: PositiveInt = 1
    threads: PositiveInt = 2
    """CPU threads of each process."""


class TagSettings(Section):
    """Set how many tags a post gets, and their names: docs/tags.md."""

    min_tags: Count = 0
    """At least this many tags, those with the best scores, even below their thresholds."""
    max_tags: PositiveInt | None = None
    """At most this many tags, those with the best scores; null: no limit."""
    tags: Path | None = None
    """YAML file with tags to hide, rename or map; it is read again when it changes."""
    near_misses: Count = 3
    """At most this many tags that the post does not get, with scores of at least half their
    thresholds, are written as ``near_misses``."""

    @model_validator(mode="after")
    def _some(self) -> TagSettings:
        if self.max_tags is not None and self.max_tags < self.min_tags:
            raise ValueError(f"min_tags ({self.min_tags}) is more than max_tags ({self.max_tags})")
        return self


class FusionSettings(TagSettings):
    """The fusion process and the bundle it serves."""

    bundle: Path = Path("workshop/weights/insight")
    image_as_frames: bool = False
    """Images join the video's frames; must be what the bundle was trained with."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$")] = "cpu"
    threads: PositiveInt = 1
    batch_size: PositiveInt = 64
    reload_s: Seconds = 0.5
    """Seconds between two checks of the folders for new bundles."""
    shadow: Path | None = None
    """Folder of a bundle on trial; by default that of ``bundle`` with ``.shadow`` added."""


class WorkerSettings(Section):
    """The worker pool; keys left out: what tune-host has put into `host_file`, or by the cores."""

    extractors: tuple[ExtractorPlacement, ...] = (ExtractorPlacement(),)
    slots: PositiveInt = 16
    """Shared-memory slots; each holds what was decoded from one media file."""
    host_file: Path | None = Path("workshop/host.yaml")
    """File that ``insighttag tune-host`` writes; null: nothing is read."""
    start_timeout_s: Seconds = 600
    """Loading of models may take this long."""
    task_timeout_s: Seconds = 120
    """A task that a device worker has begun may take this long."""
    shutdown_timeout_s: Seconds = 10
    recycle_tasks: Annotated[int, Field(ge=0)] = 200_000
    """A decoder or device worker is replaced after this many tasks; 0: never."""
    recycle_growth_mb: Annotated[int, Field(ge=0)] = 2048
    """Or after growing by this much since it warmed up; 0 never."""
    share_batches: bool = True
    """Inputs of several posts share a batch: faster on GPUs. Kernels round a little differently for
    other batch sizes: without, a post's features are the same to the last bit in every run."""

    @model_validator(mode="after")
    def _hosted(self) -> WorkerSettings:
        hosted = {name for group in self.extractors for name in group.extractors}
        absent = [n for n in ("video", "image", "audio", "text") if n not in hosted]
        if absent:
            raise ValueError(f"no process hosts the extractors {', '.join(absent)}")
        return self


class CacheSettings(Section):
    """Features by the content of their media file and their extractor, so that each is made once.

    Shared by every daemon and script that names the same place. With it, tagging posts again with
    another bundle needs no download and no extraction.
    """

    url: str | None = None
    """A folder (``workshop/cache`` or ``file:///path``), ``redis://host``, or any fsspec URL, as
    ``s3://bucket/prefix``. Null: no cache."""
    max_mb: PositiveInt = 20_000
    """Folder: past this the entries used least recently are deleted. Redis and object stores have
    limits of their own (``maxmemory``, life-cycle rules); there it is the size that ``insighttag
    cache prune`` goes down to."""
    ttl_s: Seconds | None = 90 * 86400
    """Redis only: an entry that is not used for this time is deleted; null keeps it."""
    sources_ttl_s: Annotated[float, Field(ge=0)] | None = None
    """Time for which a URL is trusted to lead to the same file, so that it is not downloaded
    again; null: for ever, 0: never (every file is downloaded, and only then looked up)."""
    timeout_s: Seconds = 1
    """A look-up that takes longer counts as a miss."""
    retry_s: Seconds = 30
    """A cache that failed is not used for this long."""
    threads: PositiveInt = 4
    """Look-ups at once."""
    options: Mapping[str, Any] = Field(default_factory=dict)
    """Options of the fsspec file system, as ``{endpoint_url: URL}``; credentials belong into
    the environment."""

    @field_validator("url")
    @classmethod
    def _not_http(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("is empty; null switches the cache off")
        if value is not None and value.startswith(("http://", "https://", "embedded://")):
            raise ValueError(
                f"{redact(value)!r} is not a cache; use a folder, redis:// or an fsspec URL like s3://"
            )
        return value


class KingSettings(Section):
    """The coordinator."""

    attempts: PositiveInt = 5
    """Tries at one post, crashes included, before it is a dead letter."""
    backoff_s: Seconds = 2
    backoff_max_s: Seconds = 300
    post_deadline_s: Seconds = 300
    """A post in flight longer than this fails this attempt."""
    drain_timeout_s: Seconds = 30
    health_file: Path = Path("workshop/run/king.json")
    lease_s: Seconds = 60
    """A job of another King is taken over when its lease is older than this."""
    reconcile_s: Annotated[float, Field(ge=0)] | None = 300
    """Interval at which a King looks for posts that have neither a result nor a job and publishes
    them, a batch at a time; 0 or null never does. It reads the posts without
    ``<result_path>.status``: an index on that path keeps it cheap in a large collection."""
    metrics: str | None = None
    """``HOST:PORT`` at which Prometheus finds the metrics, as ``127.0.0.1:9465``; a port alone is
    one of 127.0.0.1, and null serves none. There is no log-in. docs/metrics.md"""

    @field_validator("metrics", mode="before")
    @classmethod
    def _address(cls, value: object) -> object:
        if value is None:
            return None
        text = f"127.0.0.1:{value}" if re.fullmatch("[0-9]+", str(value)) else str(value)
        if not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s/:\[\]]+):[0-9]+", text):
            raise ValueError("must be PORT or HOST:PORT, such as 127.0.0.1:9465")
        if not 1 <= split_address(text)[1] <= 65535:
            raise ValueError("its port must be from 1 to 65535")
        return text

    @property
    def retry(self) -> RetryPolicy:
        """Return the policy for attempts at one post."""
        return RetryPolicy(self.attempts, self.backoff_s, self.backoff_max_s)


class TraceSettings(Section):
    """OpenTelemetry: a span for each attempt at a post, with one for each stage."""

    endpoint: str | None = None
    """URL for OTLP over HTTP, such as ``http://127.0.0.1:4318/v1/traces``; null: no traces. Needs
    the extra ``otel``; credentials go into ``OTEL_EXPORTER_OTLP_HEADERS``. docs/metrics.md"""
    ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of posts to trace; for a message with a ``traceparent``, the publisher decides."""

    @field_validator("endpoint")
    @classmethod
    def _http(cls, value: str | None) -> str | None:
        if value is not None and not _HTTP_URL.fullmatch(value):
            way_out = "use http:// or https://, as http://127.0.0.1:4318/v1/traces"
            raise ValueError(f"{redact(value)!r} is not the URL of a collector; {way_out}")
        return value


class EmbeddedSettings(Section):
    """Files of the embedded broker and database."""

    folder: Path = Path("workshop/embedded")


class LogSettings(Section):
    """structlog output on standard error."""

    format: Literal["auto", "json", "pretty"] = "auto"
    """`auto` is pretty on a terminal, JSON elsewhere."""
    level: Literal["debug", "info", "warning", "error"] = "info"


class WatchdogSettings(Section):
    """The watchdog under supervisord or systemd."""

    stall_s: Seconds = 60
    """A King without progress for so long is restarted; above the time-outs of the broker and the
    database, or a King that waits for one of them may be restarted with them."""
    interval_s: Seconds = 2
    probe_timeout_s: Seconds = 3
    """The watchdog's own questions to the broker and the database may take this long."""
    dump_s: Seconds = 2
    """Time for a stalled King to write its stacks before it is killed."""
    start_timeout_s: Seconds = 900
    """Loading of models may take this long; above workers.start_timeout_s."""
    restarts: PositiveInt = 5
    """Restarts within `restart_window_s`; past them the watchdog only reports."""
    restart_window_s: Seconds = 1800
    rpc_timeout_s: Seconds = 5
    program: str = "king"
    supervisor_url: Annotated[str, Field(pattern=r"^(unix://.|systemd$)")] = (
        "unix://workshop/run/supervisor.sock"
    )
    """supervisord's socket, or ``systemd``: then `program` is the name of a unit."""


class Threshold(Section):
    """From which value on a check warns, and from which it is critical; null never does."""

    warning: Annotated[float, Field(ge=0)] | None = None
    critical: Annotated[float, Field(ge=0)] | None = None


class MonitorSettings(Section):
    """Questions and limits of `scripts/mongo_supervisor/check.py`."""

    backlog_age_s: Annotated[float, Field(ge=0)] = 900
    """Untagged posts older than this are backlog. A post's age is that of `store.fields.created`,
    or of its ObjectId; with 0 every untagged post counts, also where there is neither."""
    scan: PositiveInt = 100_000
    """The most untagged posts that one check reads."""
    window_s: Seconds = 3600
    """The failed ratio counts results of this recent time."""
    min_results: PositiveInt = 20
    """Fewer results than this make no ratio."""
    overdue_s: Seconds = 120
    """A job that is due for longer than this is overdue: no daemon looks after it."""
    timeout_s: Seconds = 10
    latency_s: Threshold = Threshold(warning=0.5, critical=2)
    backlog: Threshold = Threshold(warning=100, critical=10_000)
    failed_ratio: Threshold = Threshold(warning=0.05, critical=0.25)
    last_tag_age_s: Threshold = Threshold(warning=900, critical=3600)
    """Checked only while posts wait."""
    overdue_jobs: Threshold = Threshold(warning=1, critical=100)
    dead_letters: Threshold = Threshold(warning=100, critical=10_000)
    queue_depth: Threshold = Threshold(warning=10_000, critical=100_000)
    replica_lag_s: Threshold = Threshold(warning=10, critical=60)

    @field_validator("*", mode="before")
    @classmethod
    def _other_half(cls, value: object, info: ValidationInfo) -> object:
        """Keep the default of the value of a threshold that is not set."""
        default = cls.model_fields[str(info.field_name)].default
        if isinstance(default, Threshold) and isinstance(value, dict):
            return {**default.model_dump(), **value}
        return value


class HttpSettings(Section):
    """`flask_server.py`: where it listens, and what one request may ask for.

    Uploads lie in a folder of their own under ``fetch.spool`` while their post is being tagged.
    """

    host: str = "127.0.0.1"
    """There is no login: let others in only through a proxy that requires one."""
    allowed_hosts: tuple[HostName, ...] = ()
    """Names without port that requests may be addressed to, as a proxy's; besides `host`,
    ``localhost`` and IP addresses. Others are refused: a foreign site could point its own here."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8080
    threads: PositiveInt = 32
    """Requests that are served at once; above `posts`, so that health is answered while busy."""
    posts: PositiveInt = 16
    """Posts that are being tagged at once; more wait for `queue_s`, and are then refused."""
    queue_s: Annotated[float, Field(ge=0)] = 5
    retry_after_s: PositiveInt = 5
    """Value of Retry-After for a refused client."""
    deadline_s: Seconds = 120
    """One post may take this long."""
    header_timeout_s: Seconds = 10
    """A request's headers must have arrived within this time."""
    body_timeout_s: Seconds = 120
    """A request's body must have arrived within this time."""
    max_body_bytes: PositiveInt = 256 * MIB
    max_json_bytes: PositiveInt = MIB
    max_files: PositiveInt = 20
    """Files and URLs of one post together."""
    max_text_chars: PositiveInt = 20_000
    shutdown_timeout_s: Seconds = 30
    """Requests in flight may take this long to finish on SIGTERM."""
    probe_timeout_s: Seconds = 2
    """`/readyz` asks the broker and the database for at most this long."""


class CollectionSettings(Section):
    """Options for tags written to a MongoDB collection."""

    id: str = "_id"
    """Dotted path of a post's ID in its document."""
    result_path: str = "insight"
    """The sub-document that tags are written to."""
    insert: bool = True
    """Make a document for a post that the collection does not have; false skips such a post."""
    timeout_s: Seconds = 10


class RunSettings(Section):
    """Options of an inference, from feature files or from raw media."""

    n_gpus: Count | None = None
    """0 runs on the CPU; null takes one GPU where there is one. Each has a process of its own."""
    processes: PositiveInt = 1
    """Processes on the CPU."""
    batch_size: PositiveInt = 64
    """Posts that are written, and on feature files inferred, together."""
    output: str | None = None
    """A file, or ``mongodb://.../database.collection``; null writes to standard output."""
    format: Literal["auto", "jsonl", "csv", "mongodb"] = "auto"
    """``auto`` goes by the output's name."""
    scores: bool = True
    """Write the score of every class next to the tags."""
    skip_bad: bool = False
    """Leave out posts that cannot be tagged, count and list them; otherwise the first one ends
    the run."""
    collection: CollectionSettings = CollectionSettings()
    progress_dir: Path = Path("workshop/infer")
    """Folder for the list of posts that a run into MongoDB left out; others list them next to the
    output."""
    allow_pickle: bool = False
    """Load a ``.pth`` that is a whole pickled model, which runs code that is in the file."""
    progress: bool = True

    @field_validator("output")
    @classmethod
    def _named(cls, value: str | None) -> str | None:
        if value is not None and is_database(value) and not collection_of(value):
            raise ValueError(f"{redact(value)!r} must end in /database.collection")
        return value


class InferSettings(RunSettings, TagSettings):
    """All settings of `infer_net.py` on feature files."""

    bundle: Path = Path("workshop/weights/insight")
    features: Path = Path("workshop/features")
    """Root of the feature files, for inputs that name only post IDs."""
    threads: PositiveInt | None = None


class Settings(Section):
    """All settings of the daemon and the online commands."""

    broker: BrokerSettings = BrokerSettings()
    store: StoreSettings = StoreSettings()
    fetch: FetchSettings = FetchSettings()
    decode: DecodeSettings = DecodeSettings()
    features: FeatureSettings = FeatureSettings()
    workers: WorkerSettings = WorkerSettings()
    cache: CacheSettings = CacheSettings()
    fusion: FusionSettings = FusionSettings()
    king: KingSettings = KingSettings()
    traces: TraceSettings = TraceSettings()
    watchdog: WatchdogSettings = WatchdogSettings()
    monitor: MonitorSettings = MonitorSettings()
    http: HttpSettings = HttpSettings()
    embedded: EmbeddedSettings = EmbeddedSettings()
    log: LogSettings = LogSettings()
    infer: RunSettings = RunSettings()
    """`infer_net.py` with these settings: raw media to tags, without queue and workers."""

    @property
    def media_in_work(self) -> int:
        """Return how many media files can be in work: downloading, decoding, or in a slot."""
        return self.fetch.connections + self.decode.processes + self.workers.slots

    @model_validator(mode="after")
    def _heard(self) -> Settings:
        hosted = any("asr" in group.extractors for group in self.workers.extractors)
        if self.features.asr.enabled and not hosted:
            raise ValueError("features.asr is enabled: add asr to a list in workers.extractors")
        return self
