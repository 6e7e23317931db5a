"""Addresses that clients name: only the public internet, however the way inside is written."""

import http.server
import io
import ipaddress
import math
import threading
import time

import openai
import pytest
from PIL import Image

from deepseek_vl2.serve.api.errors import ApiError
from deepseek_vl2.serve.api.pictures import PictureLoader
from deepseek_vl2.serve.api.prompts import PromptBuilder
from deepseek_vl2.serve.api.public_fetch import MAX_REDIRECTS, PublicFetcher, is_public
from deepseek_vl2.serve.api.schemas import ChatRequest
from deepseek_vl2.serve.picture_limits import PictureLimits

NOT_PUBLIC = "does not lead to a host on the public internet"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
        "0.0.0.0", "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "203.0.113.9", "224.0.0.1", "239.1.1.1",
        "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fc00::1", "fd12::1", "fec0::1", "ff02::1",
        "2001:db8::1",
        "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.1.1", "::7f00:1", "64:ff9b::7f00:1", "64:ff9b::a00:1",
        "2002:7f00:1::", "2002:a00:1::1", "2001:0:7f00:1::",
    ],
)  # fmt: skip
def test_what_is_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "172.32.0.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_what_is_public(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.1", "017700000001", "localhost", "[::1]",
        "10.0.0.1", "127.0.0.1.",
        "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "169.254.169.254", "192.168.0.1:8080", "0", "１２７.0.0.1",
    ],
)  # fmt: skip
def test_ways_inside_are_refused(host):
    """With the system's own resolver, which reads numbers in all these forms."""
    with pytest.raises(ValueError, match=NOT_PUBLIC):
        PublicFetcher(1000).fetch(f"http://{host}/picture.png")


@pytest.mark.parametrize(
    "addresses", [["10.0.0.1"], ["1.1.1.1", "127.0.0.1"], ["1.1.1.1", "fe80::1%eth0"], [], ["nonsense"]]
)
def test_all_addresses_of_a_name_must_be_public(addresses):
    with pytest.raises(ValueError, match=NOT_PUBLIC):
        PublicFetcher(1000, resolve=lambda host, port: addresses).fetch("https://pictures.example/a.png")


def test_an_unknown_name_is_refused_in_the_same_words():
    def resolve(host, port):
        raise OSError("no such name")

    with pytest.raises(ValueError, match=NOT_PUBLIC):
        PublicFetcher(1000, resolve=resolve).fetch("https://inside.example/a.png")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://pictures.example/a.png", "only http: and https:"),
        ("file:///etc/passwd", "not a valid address"),
        ("http://", "not a valid address"),
        ("http://user:word@pictures.example/", "user or a password"),
        ("http://pictures.example:99999/", NOT_PUBLIC),
    ],
)
def test_bad_addresses(url, words):
    with pytest.raises(ValueError, match=words):
        PublicFetcher(1000, resolve=lambda host, port: ["127.0.0.1"]).fetch(url)


class Pictures(http.server.BaseHTTPRequestHandler):
    """Serves a picture, redirects, and all that can be wrong."""

    def do_GET(self):
        target = {
            "/inside": "http://inside.example/",
            "/file": "file:///etc/passwd",
            "/round": "/round",
            "/to": "a.png",
        }
        if self.path in target:
            self.send_response(302)
            self.send_header("Location", target[self.path])
            self.end_headers()
        elif self.path == "/a.png":
            self.server.hosts.append(self.headers["Host"])
            self.answer(picture())
        elif self.path == "/pause":
            time.sleep(0.2)
            self.answer(picture())
        elif self.path == "/large":
            self.answer(b"x" * 5000)
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
        else:
            self.send_error(404)

    def answer(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def picture():
    packed = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(packed, "PNG")
    return packed.getvalue()


@pytest.fixture(scope="module")
def pictures():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.hosts = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def fetcher(pictures, names=("pictures.example",), **options):
    """Finds this machine's server under public names; that it may be reached is said here and nowhere else."""

    def resolve(host, port):
        return ["127.0.0.1"] if host in names else ["10.0.0.1"]

    allowed = {ipaddress.ip_address("127.0.0.1")}
    return PublicFetcher(3000, resolve=resolve, is_allowed=lambda address: address in allowed, **options)


def url(pictures, path):
    return f"http://pictures.example:{pictures.server_port}{path}"


@pytest.mark.parametrize("path", ["/a.png", "/to"])
def test_a_picture_comes_from_the_address_that_was_checked(pictures, path):
    assert fetcher(pictures).fetch(url(pictures, path)) == picture()
    assert pictures.hosts[-1] == f"pictures.example:{pictures.server_port}"


def test_a_name_is_looked_up_once_for_a_connection(pictures):
    """A second look-up could give another answer ("DNS rebinding")."""
    looked_up = []

    def resolve(host, port):
        looked_up.append(host)
        return ["127.0.0.1"]

    PublicFetcher(3000, resolve=resolve, is_allowed=lambda address: True).fetch(url(pictures, "/a.png"))
    assert looked_up == ["pictures.example"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/inside", NOT_PUBLIC),
        ("/file", "not a valid address|only http"),
        ("/round", f"more than {MAX_REDIRECTS} times"),
        ("/large", "larger than 3000 bytes"),
        ("/missing", "HTTP 404"),
    ],
)
def test_redirects_and_sizes(pictures, path, words):
    with pytest.raises(ValueError, match=words):
        fetcher(pictures).fetch(url(pictures, path))


def test_time_is_limited_even_if_some_bytes_come(pictures):
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="did not answer within"):
        fetcher(pictures, timeout=0.5).fetch(url(pictures, "/slow"))
    assert time.monotonic() - start < 2


def test_the_pictures_of_a_request_have_one_deadline(nano, pictures, ask):
    builder = PromptBuilder(nano, PictureLoader(PictureLimits(), fetcher(pictures, timeout=0.5)))
    messages = ChatRequest.model_validate(
        {"model": "nano", "messages": ask("What?", *[url(pictures, "/pause")] * 4)}
    ).messages
    with pytest.raises(ApiError, match="did not answer within") as caught:
        builder.build(messages, threading.Event())
    assert caught.value.param != "messages.0.content.0.image_url.url"  # the first was in time


def test_nothing_more_is_fetched_for_a_client_that_has_gone(nano, pictures, ask):
    is_cancelled = threading.Event()
    asked = []

    class Fetcher:
        def deadline(self):
            return math.inf

        def fetch(self, address, deadline):
            asked.append(address)
            is_cancelled.set()
            return picture()

    builder = PromptBuilder(nano, PictureLoader(PictureLimits(), Fetcher()))
    messages = ChatRequest.model_validate(
        {"model": "nano", "messages": ask("What?", "https://a.example/1", "https://a.example/2")}
    ).messages
    with pytest.raises(ApiError, match="nobody waits"):
        builder.build(messages, is_cancelled)
    assert asked == ["https://a.example/1"]


def test_a_host_that_refuses(pictures):
    with pytest.raises(ConnectionError, match="cannot be reached"):
        fetcher(pictures).fetch("http://pictures.example:9/a.png")


def test_the_server_fetches_where_it_is_allowed(nano, serve, pictures, ask):
    with serve(nano, allow_url_fetch=True, fetcher=fetcher(pictures)) as running:

        def answer(address):
            return running.client.chat.completions.create(
                model="nano", messages=ask("What color?", address), max_tokens=1
            )

        assert answer(url(pictures, "/a.png")).usage.prompt_tokens_details.image_tokens > 0
        for address in (url(pictures, "/inside"), "http://inside.example/", "http://[::1]/"):
            with pytest.raises(openai.BadRequestError, match=NOT_PUBLIC) as caught:
                answer(address)
            assert caught.value.code == "invalid_image_url"
            assert caught.value.param == "messages.0.content.0.image_url.url"


def test_the_server_never_fetches_from_inside(nano, serve, pictures, ask):
    """The default of a server that may fetch: a local picture that is there is refused."""
    with serve(nano, allow_url_fetch=True) as running:
        for host in ("127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]"):
            address = f"http://{host}:{pictures.server_port}/a.png"
            with pytest.raises(openai.BadRequestError, match=NOT_PUBLIC):
                running.client.chat.completions.create(model="nano", messages=ask("What color?", address))
