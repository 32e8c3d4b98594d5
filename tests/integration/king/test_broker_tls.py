"""``amqps://`` and ``rediss://``: encrypted, and the broker's certificate is verified."""

import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import BrokerUnavailable
from king.broker.connect import open_broker
from king.messages import PostMessage
from tests.support.king.broker_rig import Consumer, connected, settings_for
from tests.support.processes import ran
from tests.support.proxy import proxy_to
from tests.support.services import RabbitMQServer, RedisServer, unavailable


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of 127.0.0.1, with its key in the same file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        unavailable("no openssl command to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", "key.pem"]
    words += ["-out", "cert.pem", "-subj", "/CN=127.0.0.1", "-addext"]
    ran(str(openssl), *words, "subjectAltName=IP:127.0.0.1", cwd=folder, check=True)
    both = folder / "both.pem"
    both.write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return both


@pytest.fixture
def secure_url(broker_server: RedisServer | RabbitMQServer, certificate: Path) -> Iterator[str]:
    """The URL of each kind of broker behind TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with proxy_to(broker_server.address, context) as proxy:
        url = broker_server.url.replace("://", "s://", 1)
        yield url.replace(f":{broker_server.port}/", f":{proxy.port}/")


def test_a_known_certificate_is_taken(secure_url: str, certificate: Path, queue_name: str) -> None:
    """With its authority named in the URL, posts go there and back."""
    settings = settings_for(f"{secure_url}?ssl_ca_certs={certificate}", queue_name)
    with connected(settings) as broker:
        broker.publish([PostMessage("p1")])
        consumer = Consumer(broker, ack=True)
        consumer.take(1)
        assert consumer.idle(2.5) == 0
        assert broker.generation == 1


def test_an_unknown_certificate_is_refused(secure_url: str, queue_name: str) -> None:
    """Without it, the system's authorities decide, and the connection is refused by name."""
    broker = open_broker(settings_for(secure_url, queue_name))
    with pytest.raises(BrokerUnavailable, match=r"(?i)certificate verify failed"):
        broker.connect()
