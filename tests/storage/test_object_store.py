"""The S3 server and the proxy that other tests rely on: real clients get the objects, and each fault works."""

import datetime
import http.client
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import obstore
import pytest

from fault_proxy import FaultProxy
from faults import Close, Cut, FlippedBit, Replaced, Reset, Stall, Status, Trickle, WrongLength
from object_store import S3Server, StorageError, remove_sockets
from ranks import ROOT

DATA = random.Random(0).randbytes(3_000_000)
KEY = "set/train 00000.tar"
PATH = f"/data/{KEY}"
NO_RETRY = {"retry_config": {"max_retries": 0}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        server.put(KEY, DATA)
        yield server


@pytest.fixture()
def proxy(server):
    with FaultProxy(server.endpoint) as proxy:
        yield proxy


@pytest.fixture()
def store(server, proxy):
    """A client of the proxy that tries once."""
    return server.store(proxy.endpoint, **NO_RETRY)


def read(store, key=KEY, **options):
    return bytes(obstore.get(store, key, options=options).bytes())


def url(server, proxy, key=KEY):
    """A signed URL, so that clients without support for S3 may read the object."""
    return obstore.sign(server.store(proxy.endpoint), "GET", key, datetime.timedelta(minutes=5))


def until_it_breaks(address):
    """The bytes that urllib reads from a URL, and its error at the end."""
    answer, got = urllib.request.urlopen(address, timeout=30), b""
    try:
        while piece := answer.read1(2**16):
            got += piece
    except OSError as error:
        return got, error
    return got, None


# The server


def test_objects_come_and_go(server, proxy, store, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "one.txt").write_bytes(b"1")
    (tmp_path / "deep" / "two.txt").write_bytes(b"2")
    assert server.put_folder(tmp_path, "folder/") == ["folder/deep/two.txt", "folder/one.txt"]
    for client in (server.store(), store):
        assert read(client, "folder/deep/two.txt") == b"2"
        assert sorted(item["path"] for item in obstore.list(client, "folder").collect()) == [
            "folder/deep/two.txt",
            "folder/one.txt",
        ]
    server.delete("folder/one.txt")
    with pytest.raises(FileNotFoundError):
        read(store, "folder/one.txt")
    obstore.put(store, "written/through the proxy", b"3")
    assert read(server.store(), "written/through the proxy") == b"3"
    assert [r.status for r in proxy.seen("*one.txt")] == [404]


def test_wrong_credentials_are_refused_directly_and_through_the_proxy(server, proxy):
    for endpoint in (server.endpoint, proxy.endpoint):
        with pytest.raises(obstore.exceptions.PermissionDeniedError):
            read(server.store(endpoint, secret_access_key="another", **NO_RETRY))


def test_clients_find_everything_in_the_environment(server, proxy):
    program = "import sys, obstore.store as s; print(len(s.S3Store('data').get(sys.argv[1]).bytes()))"
    for environment in (server.environment, proxy.environment):
        command = [sys.executable, "-c", program, KEY]
        assert int(subprocess.check_output(command, env={**os.environ, **environment})) == len(DATA)
    curl = "curl -sSf --noproxy * --aws-sigv4 aws:amz:us-east-1:s3 --user test:only-for-tests --range 100-199"
    sent = subprocess.check_output([*curl.split(), f"{proxy.endpoint}/data/set/train%2000000.tar"])
    assert sent == DATA[100:200]
    assert proxy.requests[-1].range == "bytes=100-199" and proxy.requests[-1].status == 206


@pytest.mark.slow
def test_it_may_be_stopped_and_started_again(tmp_path):
    with S3Server(tmp_path) as server:
        server.put("kept", b"still here")
        endpoint, store = server.endpoint, server.store(**NO_RETRY)
        with pytest.raises(StorageError, match="runs already"):
            server.start()
        server.stop()
        assert server.pid is None
        with FaultProxy(endpoint) as proxy, pytest.raises(Exception, match="502"):
            read(server.store(proxy.endpoint, **NO_RETRY), "kept")
        with pytest.raises(Exception, match=r"[Cc]onnect"):
            read(store, "kept")
        server.start()
        assert server.endpoint == endpoint and read(store, "kept") == b"still here"


def test_it_dies_with_the_process_that_started_it(tmp_path):
    program = """if True:
        import sys, time, object_store
        server = object_store.S3Server(sys.argv[1])
        server.start()
        print(server.pid, *server.ports, flush=True)
        time.sleep(60)
    """
    where = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support")}
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=where, stdout=subprocess.PIPE)
    pid, *ports = map(int, parent.stdout.readline().split())
    assert b"weed" in Path(f"/proc/{pid}/cmdline").read_bytes()
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)
    remove_sockets(ports)


def alive(pid):
    """Whether a process runs. A zombie does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


# The proxy without faults


def test_ranges_pass_and_connections_are_kept(server, proxy):
    path = url(server, proxy).removeprefix(proxy.endpoint)
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port)
    sockets = set()
    for first in (0, 1000, len(DATA) - 10):
        connection.request("GET", path, headers={"Range": f"bytes={first}-{first + 9}"})
        answer = connection.getresponse()
        assert answer.read() == DATA[first : first + 10] and answer.status == 206
        assert answer.getheader("Content-Range") == f"bytes {first}-{first + 9}/{len(DATA)}"
        sockets.add(connection.sock.fileno())
    connection.close()
    assert len(sockets) == 1 and [r.sent for r in proxy.seen(PATH)] == [10, 10, 10]


def test_heads_and_lists_and_counts(proxy, store):
    assert obstore.head(store, KEY)["size"] == len(DATA)
    obstore.list(store, "set").collect()
    assert read(store) == DATA
    assert [r.method for r in proxy.requests] == ["HEAD", "GET", "GET"]
    assert "list-type=2" in proxy.seen("/data", "GET")[0].query
    assert len(proxy.seen("*.tar", "GET")) == 1 and proxy.seen("*.tar", "GET")[0].sent == len(DATA)
    proxy.clear()
    assert proxy.seen() == []


# Each fault, and how often it strikes


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_status_for_the_first_requests(server, proxy, store, status):
    rule = proxy.add(Status(status), path="*.tar", first=2)
    for _ in range(2):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(url(server, proxy))
        assert error.value.code == status and b"<Code>" in error.value.read()
    assert read(store) == DATA
    assert rule.hits == 2 and [r.status for r in proxy.seen(PATH)] == [status, status, 200]
    assert [r.fault for r in proxy.requests] == ["Status", "Status", ""]


def test_status_for_a_while(proxy, store):
    proxy.add(Status(503), seconds=1.5)
    started = time.monotonic()
    while True:
        try:
            assert read(store) == DATA
            break
        except obstore.exceptions.GenericError as error:
            assert "503" in str(error)
            time.sleep(0.1)
    assert time.monotonic() - started >= 1.5 and proxy.requests[0].status == 503


def test_status_after_some_requests(proxy, store):
    proxy.add(Status(404), skip=1, first=1)
    assert read(store) == DATA
    with pytest.raises(FileNotFoundError):
        read(store)
    assert read(store) == DATA


def test_a_rule_strikes_its_own_path_and_method(server, proxy, store):
    server.put("other", b"fine")
    proxy.add(Status(500), path=PATH)
    proxy.add(Status(403), path="*", method="HEAD")
    assert read(store, "other") == b"fine"
    with pytest.raises(obstore.exceptions.PermissionDeniedError):
        obstore.head(store, "other")
    with pytest.raises(Exception, match="500"):
        read(store)


def test_retries_of_a_real_client_get_through(server, proxy):
    proxy.add(Status(503), first=3)
    assert read(server.store(proxy.endpoint)) == DATA
    assert [r.status for r in proxy.requests] == [503, 503, 503, 200]


@pytest.mark.parametrize("after", [0, 1000, 700_000])
def test_reset_in_mid_body(server, proxy, store, after):
    proxy.add(Reset(after), path="*.tar")
    got, error = until_it_breaks(url(server, proxy))
    assert isinstance(error, ConnectionResetError) and got == DATA[:after]
    with pytest.raises(Exception, match=r"(?i)error decoding response body|reset|request or response body error"):
        read(store)


@pytest.mark.parametrize("after", [0, 1000, 700_000])
def test_clean_close_in_mid_body(server, proxy, store, after):
    proxy.add(Close(after), path="*.tar")
    assert until_it_breaks(url(server, proxy)) == (DATA[:after], None)
    with pytest.raises(Exception, match=r"(?i)error decoding response body|end of file|request or response body error"):
        read(store)


def test_stall(server, proxy):
    proxy.add(Stall(60), first=1)
    with pytest.raises(TimeoutError):
        urllib.request.urlopen(url(server, proxy), timeout=0.3)
    proxy.add(Stall(60, after=1000), first=2)
    answer = urllib.request.urlopen(url(server, proxy), timeout=1)
    assert answer.read(1000) == DATA[:1000]
    with pytest.raises(TimeoutError):
        answer.read(1)
    with pytest.raises(Exception, match=r"(?i)timed? ?out|request or response body error"):
        read(server.store(proxy.endpoint, client_options={"allow_http": True, "timeout": "1s"}, **NO_RETRY))


@pytest.mark.parametrize("after", [None, 0, 1000])
def test_the_rest_comes_after_a_stall(proxy, store, after):
    proxy.add(Stall(0.5, after), first=1)
    started = time.monotonic()
    assert read(store) == DATA
    assert time.monotonic() - started >= 0.5


def test_trickle(proxy, store):
    proxy.add(Trickle(100_000))
    started = time.monotonic()
    assert read(store, range=(0, 50_000)) == DATA[:50_000]
    assert time.monotonic() - started >= 0.5


def test_wrong_length(server, proxy, store):
    proxy.add(WrongLength(500), first=2)
    answer = urllib.request.urlopen(url(server, proxy))
    assert int(answer.headers["Content-Length"]) == len(DATA) + 500
    with pytest.raises(http.client.IncompleteRead):
        answer.read()
    with pytest.raises(Exception, match=r"(?i)error decoding response body|end of file|request or response body error"):
        read(store)
    proxy.add(WrongLength(-500), first=1)
    assert read(store) == DATA[:-500], "this client believes the header"
    proxy.add(Cut(500), first=1)
    assert read(store) == DATA[:-500]
    assert read(store) == DATA
    assert [r.sent - len(DATA) for r in proxy.seen(PATH)] == [0, 0, 0, -500, 0]


def test_flipped_bit(proxy, store):
    offset = 1_234_567
    proxy.add(FlippedBit(offset, bit=3))
    flipped = DATA[:offset] + bytes([DATA[offset] ^ 8]) + DATA[offset + 1 :]
    assert read(store) == flipped
    assert read(store, range=(offset - 5, offset + 5)) == flipped[offset - 5 : offset + 5]
    assert read(store, range=(0, offset)) == DATA[:offset]
    assert read(store, range=(offset + 1, offset + 9)) == DATA[offset + 1 : offset + 9]


def test_an_object_is_replaced_while_it_is_read(server, proxy, store):
    server.put("changing", DATA)
    tag = obstore.head(store, "changing")["e_tag"]
    proxy.add(Replaced(lambda: server.put("changing", b"another"), after=100_000), first=1)
    assert until_it_breaks(url(server, proxy, "changing"))[0] == DATA[:100_000]
    with pytest.raises(obstore.exceptions.PreconditionError):
        read(store, "changing", if_match=tag, range=(100_000, 200_000))
    assert read(store, "changing") == b"another"
    proxy.add(Replaced(lambda: server.put("changing", b"a third")), first=1, skip=1)
    assert [read(store, "changing") for _ in range(3)] == [b"another", b"a third", b"a third"]


def test_nobody_listens_for_a_while(server, proxy, store):
    waiting = urllib.request.urlopen(url(server, proxy))
    with proxy.down():
        with pytest.raises(urllib.error.URLError) as error:
            urllib.request.urlopen(url(server, proxy))
        assert isinstance(error.value.reason, ConnectionRefusedError)
        assert len(waiting.read1(10)) <= 10
    assert read(store) == DATA
    back = proxy.down_for(0.5)
    started = time.monotonic()
    assert read(server.store(proxy.endpoint)) == DATA, "a client that retries"
    assert time.monotonic() - started >= 0.4
    back.join()


def test_a_connection_in_use_breaks_when_the_proxy_goes_down(server, proxy):
    proxy.add(Trickle(200_000))
    answer = urllib.request.urlopen(url(server, proxy))
    answer.read(1000)
    with proxy.down(), pytest.raises((http.client.IncompleteRead, ConnectionError)):
        answer.read()
