"""No URL of a post reaches an address inside, and none carries credentials on."""

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from common.errors import FetchRefused, FetchRetryable
from common.post import Media
from config.settings import BrokerSettings, FetchSettings, Settings, StoreSettings
from tests.support.workers.fetching import fetch
from tests.support.workers.ssrf_net import BODY, PUBLIC_V4, PUBLIC_V6, Net, loopback_net
from workers.pool.channel import encode
from workers.pool.pool import ProcessPool
from workers.pool.supervisor import pinned_environment, worker_specs

ZONE = {
    "public.example": [[PUBLIC_V4]],
    "public6.example": [[PUBLIC_V6]],
    "localhost": [["127.0.0.1", "::1"]],  # with a dot at its end not every system knows it
    "loopback.example": [["127.0.0.1"]],
    "loopback6.example": [["::1"]],
    "private.example": [["10.0.0.5"]],
    "mapped.example": [["::ffff:10.0.0.5"]],
    "ula.example": [["fd00:ec2::254"]],
    "metadata.google.internal": [["169.254.169.254"]],
    "metadata": [["169.254.169.254"]],
    "instance-data": [["169.254.169.254"]],
    "127.0.0.1.nip.example": [["127.0.0.1"]],
    "127.0.0.1": [["127.0.0.1"]],  # asked for with a dot at its end
    # The trap would be reached by whoever resolves twice: for a check, and for the connection.
    "rebind.example": [[PUBLIC_V4], ["127.0.0.1"]],
    "rebind-later.example": [["127.0.0.1"], [PUBLIC_V4]],
    "mixed.example": [["127.0.0.1", "10.0.0.1", PUBLIC_V4, "::1"]],
    "all-private.example": [["127.0.0.1", "10.0.0.1", "::1", "fe80::1", "169.254.169.254"]],
    "xn--fiqs8s.example": [["192.168.0.1"]],
}

# Each form leads to an address that is not public, in one way or another of writing it.
FORMS = {
    # loopback
    "dotted": "http://127.0.0.1/",
    "other loopback": "http://127.255.255.254/",
    "two parts": "http://127.1/",
    "three parts": "http://127.0.1/",
    "hexadecimal": "http://0x7f000001/",
    "hexadecimal parts": "http://0x7f.0x0.0x0.0x1/",
    "decimal": "http://2130706433/",
    "octal parts": "http://0177.0.0.1/",
    "octal": "http://017700000001/",
    "octal with zeros": "http://0000000177.0.0.1/",
    "mixed bases": "http://0x7f.1/",
    "localhost": "http://localhost/",
    "localhost with a dot": "http://localhost./",
    "localhost in capitals": "http://LOCALHOST/",
    "IPv6 loopback": "http://[::1]/",
    "IPv6 loopback in full": "http://[0:0:0:0:0:0:0:1]/",
    "IPv4-mapped": "http://[::ffff:127.0.0.1]/",
    "IPv4-mapped in hexadecimal": "http://[::ffff:7f00:1]/",
    "IPv4-compatible": "http://[::127.0.0.1]/",
    "IPv4-translated": "http://[::ffff:0:127.0.0.1]/",
    "zero": "http://0.0.0.0/",
    "zero in short": "http://0/",
    "IPv6 unspecified": "http://[::]/",
    # metadata of clouds
    "metadata": "http://169.254.169.254/latest/meta-data/",
    "metadata in decimal": "http://2852039166/",
    "metadata mapped": "http://[::ffff:a9fe:a9fe]/",
    "metadata by IPv6": "http://[fd00:ec2::254]/",
    "metadata in shared space": "http://100.100.100.200/",
    "metadata in protocol space": "http://192.0.0.192/",
    "metadata at a public number": "http://168.63.129.16/",
    "metadata by name": "http://metadata.google.internal/computeMetadata/v1/",
    "metadata by short name": "http://metadata/",
    "metadata by old name": "http://instance-data/latest/",
    # private, shared, special
    "10/8": "http://10.255.0.1/",
    "172.16/12": "http://172.31.255.255/",
    "192.168/16": "http://192.168.1.1/",
    "100.64/10": "http://100.64.0.1/",
    "192.0.0/24": "http://192.0.0.8/",
    "198.18/15": "http://198.19.0.1/",
    "test net": "http://203.0.113.7/",
    "6to4 relay": "http://192.88.99.1/",
    "multicast": "http://224.0.0.1/",
    "multicast of the world": "http://233.252.0.1/",
    "reserved": "http://240.0.0.1/",
    "broadcast": "http://255.255.255.255/",
    "IPv6 link-local": "http://[fe80::1]/",
    "IPv6 unique local": "http://[fc00::1]/",
    "IPv6 site-local": "http://[fec0::1]/",
    "IPv6 multicast": "http://[ff02::1]/",
    "NAT64": "http://[64:ff9b::7f00:1]/",
    "NAT64 of the local network": "http://[64:ff9b:1::a00:1]/",
    "6to4": "http://[2002:7f00:1::]/",
    "Teredo": "http://[2001:0:5ef5:79fd:0:0:80ff:fffe]/",
    "IPv6 documentation": "http://[3fff::1]/",
    # names
    "a name of loopback": "http://loopback.example/",
    "a name of IPv6 loopback": "http://loopback6.example/",
    "a name of a private address": "http://private.example/",
    "a name of a mapped address": "http://mapped.example/",
    "a name of a unique local address": "http://ula.example/",
    "a name that looks like an address": "http://127.0.0.1.nip.example/",
    "a name with a dot at its end": "http://private.example./",
    "a name in capitals": "http://PRIVATE.example/",
    "a name in Chinese": "http://中国.example/",
    "a name with only private addresses": "http://all-private.example/",
    # tricks of writing
    "userinfo": "http://public.example@127.0.0.1/",
    "userinfo with a password": "http://public.example:80@127.0.0.1/",
    "userinfo twice": "http://a@public.example@127.0.0.1/",
    "fragment before the at": "http://127.0.0.1#@public.example/",
    "query before the at": "http://127.0.0.1?@public.example/",
    "encoded dots": "http://127%2e0%2e0%2e1/",
    "encoded letters": "http://%6c%6f%63%61%6c%68%6f%73%74/",
    "address with a dot at its end": "http://127.0.0.1./",
    "another port": "http://127.0.0.1:6379/",
    "port of a name": "http://private.example:22/",
    "no path": "http://127.0.0.1",
    "capital scheme": "HTTP://127.0.0.1/",
    "https": "https://127.0.0.1/",
    "no scheme": "//127.0.0.1/",
}

# Written so that readers of URLs disagree on where they lead.
AMBIGUOUS = {
    "backslash before the at": "http://127.0.0.1\\@public.example/",
    "backslash after the host": "http://public.example\\@127.0.0.1/",
    "backslashes for slashes": "http:\\\\127.0.0.1\\",
    "one slash": "http:/127.0.0.1/",
    "no slash": "http:127.0.0.1/",
    "three slashes": "http:///127.0.0.1/",
    "tab in the host": "http://127.0.0\t.1/",
    "newline in the host": "http://127.0.0\n.1/",
    "line break in the path": "http://127.0.0.1/a\r\nHost: b",
    "null byte": "http://127.0.0.1\0.public.example/",
    "space before the host": "http:// 127.0.0.1/",
    "space in front": " http://127.0.0.1/",
    "two ports": "http://127.0.0.1:80:90/",
    "empty port": "http://127.0.0.1:/",
    "port that is no number": "http://127.0.0.1:abc/",
    "zone in an address that has none": "http://[::1%25lo]/",
    "zone of public form": "http://[2606:2800:220:1::1%25lo]@127.0.0.1/",
    "brackets around IPv4": "http://[127.0.0.1]/",
    "half a bracket": "http://[::1/",
    "too large a number": "http://4294967296/",
    "two dots": "http://127..0.0.1/",
    "soft hyphen": "http://local\u00adhost/",
    "IPv6 with a zone": "http://[fe80::1%25lo]/",
    "circled digits": "http://①②⑦.⓪.⓪.①/",
    "full-width digits": "http://１２７.０.０.１/",
    "full-width dots": "http://127。0。0。1/",
    "right to left": "http://\u202e1.0.0.721/",
}

SCHEMES = (
    "file:///etc/passwd",
    "file://localhost/etc/passwd",
    "FILE:///etc/passwd",
    "ftp://127.0.0.1/",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "data:image/png;base64,iVBORw0KGgo=",
    "jar:http://127.0.0.1!/a",
    "javascript:alert(1)",
    "dict://127.0.0.1:11211/stats",
    "ldap://127.0.0.1/",
    "unix:///var/run/docker.sock",
    "http+unix://%2Fvar%2Frun%2Fdocker.sock/info",
    "tftp://127.0.0.1/a",
    "ws://127.0.0.1/",
    "netdoc:///etc/passwd",
    "php://input",
    "view-source:http://127.0.0.1/",
    "127.0.0.1",
    "/etc/passwd",
)


@pytest.fixture(scope="module")
def network() -> Iterator[Net]:
    with pytest.MonkeyPatch.context() as patch, loopback_net(patch, ZONE) as made:
        yield made


@pytest.fixture
def net(network: Net) -> Net:
    """The network, with nothing remembered of the test before."""
    network.forget()
    return network


def get(url: str, folder: Path, *, allow_private_hosts: bool = False) -> bytes:
    """Download; what lies in the folder afterwards is the caller's."""
    settings = FetchSettings(
        allow_private_hosts=allow_private_hosts,
        connect_timeout_s=2,
        read_timeout_s=2,
        total_timeout_s=4,
        max_redirects=4,
    )
    return Path(fetch(Media("image", url), settings, folder, "file").path).read_bytes()


def refused(url: str, folder: Path) -> str:
    with pytest.raises(FetchRefused) as caught:
        get(url, folder)
    assert list(folder.iterdir()) == []
    return str(caught.value)


def test_public_hosts_are_reached(net: Net, tmp_path: Path) -> None:
    """The network of these tests works: a public host answers, over either family."""
    assert get("http://public.example/a", tmp_path) == BODY
    (tmp_path / "file").unlink()
    assert get("http://public6.example/a", tmp_path) == BODY
    assert net.dialled == [(PUBLIC_V4, 80), (PUBLIC_V6, 80)]
    assert net.trap.connections == 0


@pytest.mark.parametrize("form", FORMS)
def test_address_that_is_not_public_is_refused(net: Net, tmp_path: Path, form: str) -> None:
    reason = refused(FORMS[form], tmp_path)
    assert reason.endswith("is private: set fetch.allow_private_hosts to allow it")
    assert net.dialled == []
    assert (net.trap.connections, net.public.connections) == (0, 0)


@pytest.mark.parametrize("form", [n for n in FORMS if n not in ("https", "no scheme")])
def test_the_trap_catches_what_is_let_through(net: Net, tmp_path: Path, form: str) -> None:
    """The counter-check: with private hosts allowed each form does reach the trap, by a connection.

    Without it, a form that fails for another reason would pass as refused.
    """
    assert get(FORMS[form], tmp_path, allow_private_hosts=True) == BODY
    assert net.trap.connections == 1
    assert net.public.connections == 0


@pytest.mark.parametrize("form", AMBIGUOUS)
def test_ambiguous_urls_reach_nothing_private(net: Net, tmp_path: Path, form: str) -> None:
    """No reading of the URL reaches the trap; the failure is one of ours, in one line."""
    reason = ""
    try:
        get(AMBIGUOUS[form], tmp_path)
    except (FetchRefused, FetchRetryable) as error:
        reason = str(error)
    assert "\n" not in reason
    assert len(reason) < 160
    assert net.trap.connections == 0
    assert {address for address, _ in net.dialled} <= {PUBLIC_V4}


@pytest.mark.parametrize("url", SCHEMES)
def test_other_schemes_are_refused(net: Net, tmp_path: Path, url: str) -> None:
    """Only http and https are requested; nothing is opened, not even a local file."""
    assert "is not http or https" in refused(url, tmp_path)
    assert net.dialled == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1/",
        "http://[::1]:6379/",
        "//169.254.169.254/latest/",
        "http://2130706433/",
        "http://private.example/",
        "http://public.example@10.0.0.1/",
        "https://localhost/",
    ],
)
def test_redirect_to_a_private_address(net: Net, tmp_path: Path, status: int, target: str) -> None:
    """The first host is public and was reached; where it points to is not."""
    reason = refused(f"http://public.example/{status}/{quote(target, safe='')}", tmp_path)
    assert "is private" in reason
    assert net.public.connections == 1
    assert net.trap.connections == 0


@pytest.mark.parametrize("target", ["file:///etc/passwd", "gopher://127.0.0.1/", "data:,x"])
def test_redirect_to_another_scheme(net: Net, tmp_path: Path, target: str) -> None:
    reason = refused(f"http://public.example/302/{quote(target, safe='')}", tmp_path)
    assert "is not http or https" in reason
    assert net.trap.connections == 0


def test_chain_of_redirects_that_ends_at_home(net: Net, tmp_path: Path) -> None:
    target = "http://127.0.0.1/"
    for host in ("public.example", "public6.example", "public.example"):
        target = f"http://{host}/307/{quote(target, safe='')}"
    assert "127.0.0.1 is private" in refused(target, tmp_path)
    assert [address for address, _ in net.dialled] == [PUBLIC_V4, PUBLIC_V6]
    assert len(net.public.paths) == 3
    assert net.trap.connections == 0


def test_redirects_without_end(net: Net, tmp_path: Path) -> None:
    target = "http://public.example/a"
    for _ in range(5):
        target = f"http://public.example/302/{quote(target, safe='')}"
    assert refused(target, tmp_path) == "more than 4 redirects"


def test_redirects_for_browsers_are_not_followed(net: Net, tmp_path: Path) -> None:
    """A ``Refresh`` header is no redirect: what came is taken as it is."""
    assert get("http://public.example/refresh/http:%2F%2F127.0.0.1%2F", tmp_path) == BODY
    assert net.trap.connections == 0


def test_rebinding_after_the_first_answer(net: Net, tmp_path: Path) -> None:
    """The name is resolved once, for the connection itself: its second answer is never asked."""
    assert get("http://rebind.example/a", tmp_path) == BODY
    assert net.names.asked == ["rebind.example"]
    assert net.dialled == [(PUBLIC_V4, 80)]
    assert net.trap.connections == 0


def test_rebinding_between_a_host_and_its_redirect(net: Net, tmp_path: Path) -> None:
    """The host redirects to itself, and its name leads home by then: a new connection is checked.

    Another port makes the connection a new one; on the same port the old connection is kept,
    which is to the address that was checked.
    """
    target = quote("http://rebind.example:8080/a", safe="")
    assert "127.0.0.1 is private" in refused(f"http://rebind.example/302/{target}", tmp_path)
    assert net.names.asked == ["rebind.example", "rebind.example"]
    assert net.trap.connections == 0


def test_rebinding_to_public_is_not_waited_for(net: Net, tmp_path: Path) -> None:
    """A refusal is not tried again: the second answer would have been public."""
    assert "is private" in refused("http://rebind-later.example/a", tmp_path)
    assert net.names.asked == ["rebind-later.example"]


def test_name_with_public_and_private_addresses(net: Net, tmp_path: Path) -> None:
    """Of mixed answers only the public one is connected to, wherever it stands."""
    assert get("http://mixed.example/a", tmp_path) == BODY
    assert net.dialled == [(PUBLIC_V4, 80)]
    assert net.trap.connections == 0


def test_proxies_are_not_used(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy would make the connection in our place, without the check."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{net.trap.server_port}")
    assert get("http://public.example/a", tmp_path) == BODY
    assert "is private" in refused_again("http://10.0.0.1/", tmp_path)
    assert net.trap.connections == 0


def refused_again(url: str, folder: Path) -> str:
    """`refused`, where an earlier download lies in the folder."""
    (folder / "file").unlink()
    return refused(url, folder)


def test_credentials_do_not_follow_a_redirect(net: Net, tmp_path: Path) -> None:
    """Userinfo goes to its own host; the URL of the next hop carries its own, or none."""
    target = quote("http://public6.example/a", safe="")
    assert get(f"http://user:secret@public.example/302/{target}", tmp_path) == BODY
    assert [name.startswith("Basic ") for name in net.public.credentials] == [True, False]


def test_names_of_the_resolver_are_real(net: Net) -> None:
    """The name server answers as a resolver's would, also for what it does not know."""
    assert net.names.addresses("mixed.example") == ["127.0.0.1", "10.0.0.1", PUBLIC_V4, "::1"]
    with pytest.raises(socket.gaierror):
        net.names.addresses("nowhere.example")


def test_workers_get_no_passwords(tmp_path: Path) -> None:
    """Neither the first message nor the environment of any worker holds a URL with credentials."""
    settings = Settings(
        broker=BrokerSettings(url="amqp://tagger:hunter2@queue.internal/"),
        store=StoreSettings(url="mongodb://tagger:hunter2@base.internal/"),
        fetch=FetchSettings(spool=tmp_path, user_agent="Ours/1"),
    )
    environ = {
        "INSIGHTTAG_STORE__URL": "mongodb://u:hunter2@h/",
        "insighttag_broker__url": "redis://:hunter2@h/",
        "PATH": "/bin",
    }
    pool = ProcessPool(settings)
    for spec in worker_specs(settings):
        sent = encode(pool._launch(spec))
        assert b"hunter2" not in sent
        assert b".internal" not in sent
        assert b"Ours/1" in sent
        pinned = pinned_environment(spec, environ)
        assert "hunter2" not in str(pinned)
        assert pinned["PATH"] == "/bin"
    pool.stop(0)
