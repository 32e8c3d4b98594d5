"""The image, the compose files and the chart: their own linters, and the code that they name."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from config.load import load_settings
from config.settings import KingSettings, Settings
from tests.support.deploy.checkout import ROOT
from tests.support.processes import ran

DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
COMPOSE = ROOT / "deploy" / "compose"
CHART = ROOT / "deploy" / "helm" / "insighttag"
SCHEMAS = ROOT / "tests" / "support" / "deploy" / "schemas"
PASSWORDS = {"RABBITMQ_PASSWORD": "secret1", "GRAFANA_PASSWORD": "secret2"}
# Of the versions that are supported as this is written.
KUBERNETES = "1.33"

Manifests = dict[tuple[str, str], dict[str, Any]]

EVERYTHING: dict[str, Any] = {
    "web": {"enabled": True, "allowedHosts": ["tags.example.org"]},
    "gpu": {"enabled": True, "runtimeClassName": "nvidia"},
    "keda": {"enabled": True},
    "metrics": {"serviceMonitor": {"enabled": True}, "rules": {"enabled": True}},
    "secrets": {"cacheUrl": "cache-url"},
    "imagePullSecrets": [{"name": "registry"}],
    "daemon": {
        "podAnnotations": {"a": "b"},
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "batch", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "env": [{"name": "OTEL_EXPORTER_OTLP_HEADERS", "value": "x=y"}],
    },
}
BY_PROMETHEUS: dict[str, Any] = {
    "keda": {"enabled": True, "trigger": "prometheus", "prometheusUrl": "http://prometheus:9090"},
    "serviceAccount": {"create": False},
    "networkPolicy": {"enabled": False},
}


def tool(name: str) -> str:
    """Return a command of the environment or the system; skip where it is in neither."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return path or pytest.skip(f"{name} is not installed")


def run(*command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return ran(*command, timeout_s=60, env={**os.environ, **environ})


def composed(*files: str) -> dict[str, Any]:
    """Return what Docker Compose makes of some files."""
    options = [word for name in files for word in ("-f", str(COMPOSE / name))]
    done = run(tool("docker-compose"), *options, "config", "--format", "json", **PASSWORDS)
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def rendered(values: Mapping[str, Any]) -> Manifests:
    """Return the manifests of the chart by kind and name."""
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(dict(values))
        texts = chart.render(dict(values), name="prod", namespace="tags")
    documents = [
        document
        for name, text in texts.items()
        if name.endswith(".yaml")
        for document in yaml.safe_load_all(text)
        if document
    ]
    return {(it["kind"], it["metadata"]["name"]): it for it in documents}


def settings_of(environ: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return the settings of a container; unknown keys are refused."""
    for name, value in environ.items():
        if name.startswith("INSIGHTTAG_"):
            monkeypatch.setenv(name, value)
    return load_settings(None, [])


def test_hadolint_finds_no_fault_with_the_image() -> None:
    done = run(tool("hadolint"), str(DOCKERFILE))
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_has_the_lock_of_its_python_and_every_package() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    version: Any = re.search(r"^ARG PYTHON=(\d+\.\d+)\.\d+$", text, re.MULTILINE)
    assert set(re.findall(r"constraints/(py[\d.]+)\.txt", text)) == {f"py{version[1]}"}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    named = {line[1:] for line in ignored if line.startswith("!")}
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    packages = setup["options.packages.find"]["include"].replace("*", "").split()
    assert {*packages, "constraints", "*.py", "setup.cfg", "pyproject.toml"} <= named
    assert [name for name in named if not [*ROOT.glob(name)]] == []


def test_the_commands_of_the_image_are_there() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    [command] = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    [check] = re.findall(r"^    CMD (\[.*\])$", text, re.MULTILINE)
    assert (ROOT / json.loads(command)[1]).is_file()
    assert find_spec(json.loads(check)[2]) is not None


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "compose.gpu.yaml")])
def test_compose_starts_our_commands_with_our_settings(
    files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    services = composed(*files)["services"]
    daemon = settings_of(services["daemon"]["environment"], monkeypatch)
    devices = {group.device for group in daemon.workers.extractors}
    on_gpu = len(files) > 1
    assert devices == ({"cuda:0"} if on_gpu else {"cpu"})
    assert services["daemon"]["build"]["target"] == ("cuda" if on_gpu else "cpu")
    http = settings_of(services["web"]["environment"], monkeypatch).http
    assert (ROOT / services["web"]["command"][1]).is_file()
    jobs = yaml.safe_load((COMPOSE / "prometheus.yml").read_text(encoding="utf-8"))
    targets = {it["job_name"]: it["static_configs"][0]["targets"] for it in jobs["scrape_configs"]}
    assert targets["insighttag"] == [f"daemon:{str(daemon.king.metrics).rpartition(':')[2]}"]
    assert targets["insighttag-http"] == [f"web:{http.port}"]
    assert "web" in http.allowed_hosts
    stop = configparser.RawConfigParser(inline_comment_prefixes=(" ;",))
    stop.read(ROOT / "deploy" / "supervisord.conf")
    assert services["daemon"]["stop_grace_period"] == "1m30s"
    assert int(stop["program:king"]["stopwaitsecs"]) < 90


def test_compose_waits_for_health_and_opens_ports_on_loopback_only() -> None:
    services = composed("compose.yaml")["services"]
    own = {"daemon"}  # the health check of the image
    once = {"mongo-replica-set"}
    assert {n for n, it in services.items() if "healthcheck" not in it} == own | once
    conditions = {
        (name, condition["condition"])
        for it in services.values()
        for name, condition in it.get("depends_on", {}).items()
    }
    assert ("mongo-replica-set", "service_completed_successfully") in conditions
    assert {state for name, state in conditions if name not in once} == {"service_healthy"}
    published = [port for it in services.values() for port in it.get("ports", ())]
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}
    volumes = [volume for it in services.values() for volume in it.get("volumes", ())]
    mounted = [it["source"] for it in volumes if it["type"] == "bind" and it.get("read_only")]
    assert [path for path in mounted if not Path(path).is_file()] == []
    assert len(mounted) == 6


def test_compose_wants_passwords() -> None:
    done = run(
        tool("docker-compose"), "-f", str(COMPOSE / "compose.yaml"), "config", RABBITMQ_PASSWORD=""
    )
    assert done.returncode != 0
    assert "RABBITMQ_PASSWORD is missing a value" in done.stderr


def test_promtool_finds_no_fault_with_prometheus_of_compose(tmp_path: Path) -> None:
    for file in (COMPOSE / "prometheus.yml", ROOT / "deploy" / "prometheus" / "alerts.yml"):
        shutil.copy(file, tmp_path)
    promtool = os.environ.get("INSIGHTTAG_TEST_PROMTOOL") or tool("promtool")
    done = run(promtool, "check", "config", str(tmp_path / "prometheus.yml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_helm_finds_no_fault_with_the_chart() -> None:
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
    report = helm.lint(CHART)
    assert report["errors"] == []
    assert [it["error"] for it in report["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("values", [{}, EVERYTHING, BY_PROMETHEUS], ids=["few", "all", "other"])
def test_every_manifest_keeps_the_schema_of_its_kind(values: dict[str, Any]) -> None:
    """Those of Kubernetes, KEDA and the Prometheus operator; unknown keys are refused."""
    kubernetes = pytest.importorskip("kubernetes_validate", reason="it is not installed")
    jsonschema = pytest.importorskip("jsonschema", reason="it is not installed")
    manifests = rendered(values)
    assert len(manifests) >= 5
    for (kind, _), manifest in manifests.items():
        own = SCHEMAS / f"{kind}.json"
        if own.exists():
            jsonschema.validate(manifest, json.loads(own.read_text(encoding="utf-8")))
        else:
            kubernetes.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["few", "all"])
def test_an_ending_pod_has_time_for_any_post(values: dict[str, Any], tmp_path: Path) -> None:
    """By the settings that it is given: they are accepted, and its grace is above all its waits."""
    manifests = rendered(values)
    file = tmp_path / "settings.yaml"
    file.write_text(manifests["ConfigMap", "prod-insighttag-daemon"]["data"]["settings.yaml"])
    settings = load_settings(file, [])
    assert settings.king.drain_timeout_s > settings.king.post_deadline_s
    pod = manifests["Deployment", "prod-insighttag-daemon"]["spec"]["template"]["spec"]
    # As `king.king` waits: writing what was broken off, three threads, the workers, the traces.
    waits_s = settings.king.drain_timeout_s + 4 * 10 + settings.workers.shutdown_timeout_s + 4
    assert pod["terminationGracePeriodSeconds"] > waits_s
    [container] = pod["containers"]
    assert (ROOT / container["args"][1]).is_file()
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert settings.king.metrics == f"0.0.0.0:{ports['metrics']}"
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["exec"]["command"][:3] == ["python", "-m", "deploy.probe"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["resources"]["limits"].get("nvidia.com/gpu") == (1 if values else None)
    assert settings.fusion.device == ("cuda:0" if values else "cpu")


def test_the_web_server_has_the_settings_of_its_service(tmp_path: Path) -> None:
    manifests = rendered(EVERYTHING)
    file = tmp_path / "settings.yaml"
    file.write_text(manifests["ConfigMap", "prod-insighttag-web"]["data"]["settings.yaml"])
    settings = load_settings(file, [])
    [port] = manifests["Service", "prod-insighttag-web"]["spec"]["ports"]
    assert (settings.http.host, settings.http.port) == ("0.0.0.0", port["port"])
    assert settings.http.allowed_hosts == ("prod-insighttag-web", "tags.example.org")
    pod = manifests["Deployment", "prod-insighttag-web"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 5 + settings.http.shutdown_timeout_s


def test_keda_counts_ready_and_unacknowledged_messages() -> None:
    """On RabbitMQ over HTTP, or by metrics that the King serves."""
    [trigger] = rendered(EVERYTHING)["ScaledObject", "prod-insighttag-daemon"]["spec"]["triggers"]
    about = trigger["metadata"]
    assert (trigger["type"], about["protocol"], about["mode"]) == (
        "rabbitmq",
        "http",
        "QueueLength",
    )
    assert "excludeUnacknowledged" not in about
    assert about["queueName"] == Settings().broker.queue
    [trigger] = rendered(BY_PROMETHEUS)["ScaledObject", "prod-insighttag-daemon"]["spec"][
        "triggers"
    ]
    served = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = re.findall(r"insighttag_\w+", trigger["metadata"]["query"])
    assert len(names) == 2
    assert [name for name in names if f"| `{name}` |" not in served] == []


def test_the_rules_of_the_chart_are_those_of_prometheus() -> None:
    rules = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8"))
    assert rendered(EVERYTHING)["PrometheusRule", "prod-insighttag"]["spec"] == rules


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kedaa": {}}, "additional properties 'kedaa' not allowed"),
        ({"daemon": {"replicas": "two"}}, "at '/daemon/replicas': got string, want integer"),
        ({"image": {"pullPolicy": "Often"}}, "at '/image/pullPolicy'"),
        ({"weights": {"existingClaim": ""}}, "at '/weights/existingClaim'"),
        ({"web": {"allowedHosts": ["http://x"]}}, "at '/web/allowedHosts/0'"),
        ({"networkPolicy": {"mediaPorts": [99999]}}, "at '/networkPolicy/mediaPorts/0'"),
        ({"keda": {"trigger": "prometheus", "minReplicas": 0}}, "at '/keda/minReplicas'"),
        ({"keda": {"enabled": True, "trigger": "prometheus"}}, "keda.prometheusUrl: name your"),
        ({"daemon": {"drainTimeoutSeconds": 60}}, "is not above king.post_deadline_s (300)"),
        (
            {"settings": {"king": {"post_deadline_s": 900}}},
            "daemon.drainTimeoutSeconds: 330 is not above king.post_deadline_s (900)",
        ),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], said: str) -> None:
    helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed")
    with pytest.raises(helm.HelmError) as refused:
        rendered(values)
    assert said in str(refused.value)


def test_the_deadline_of_the_chart_is_that_of_the_settings() -> None:
    helpers = (CHART / "templates" / "_helpers.tpl").read_text(encoding="utf-8")
    assert f'"post_deadline_s" {KingSettings().post_deadline_s:g} ' in helpers
