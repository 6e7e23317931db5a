"""Pictures from http addresses, served on this machine."""

import io
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from deepseek_vl2.models.picture_files import load_image

PICTURE = Image.new("RGB", (6, 4), (255, 0, 0))
_buffer = io.BytesIO()
PICTURE.save(_buffer, "PNG")
DATA = _buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers by path."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["User-Agent"]))
        path = self.path.partition("?")[0]
        if path.startswith("/redirect/"):
            left = int(path.rpartition("/")[2])
            self.answer(302, Location=f"/redirect/{left - 1}" if left else "/cat.png")
        elif path == "/to-file":
            self.answer(302, Location="file:///etc/hostname")
        elif path == "/to-ftp":
            self.answer(302, Location="ftp://127.0.0.1/cat.png")
        elif path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(40):
                self.wfile.write(b"\x89")
                time.sleep(0.05)
        elif path == "/endless":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"400\r\n" + b"\x89" * 1024 + b"\r\n")
        elif path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", str(len(DATA) + 10))
            self.end_headers()
            self.wfile.write(DATA)
            self.close_connection = True
        elif path == "/page":
            self.answer(200, b"<html>not a picture</html>")
        elif path in ("/cat.png", "/a%20b/%E5%9B%BE.png"):
            self.answer(200, DATA)
        else:
            self.answer(404)

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # a client that leaves early is what some tests are about


@pytest.fixture(scope="module")
def server():
    with Server(("127.0.0.1", 0), Handler) as running:
        running.asked = []
        running.address = f"http://127.0.0.1:{running.server_address[1]}"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("path", ["/cat.png", "/cat.png?size=3 4#part", "/a b/图.png", "/redirect/3"])
def test_a_picture_comes(server, path):
    loaded = load_image(server.address + path)
    assert loaded.tobytes() == PICTURE.tobytes()
    assert server.asked[-1][1].startswith("deepseek_vl2/")


@pytest.mark.parametrize(
    ("path", "options", "error", "message"),
    [
        ("/gone.png", {}, ValueError, r"gone\.png' answered HTTP 404: Not Found"),
        ("/redirect/30", {}, ValueError, "answered HTTP 302"),
        ("/to-file", {}, ValueError, "answered HTTP 302: .*'file:///etc/hostname' is not allowed"),
        ("/to-ftp", {}, ValueError, "redirects to a 'ftp' address"),
        ("/cat.png", {"max_bytes": 20}, ValueError, "is larger than 20 bytes; raise max_bytes="),
        ("/endless", {"max_bytes": 5000}, ValueError, "is larger than 5000 bytes"),
        ("/short", {}, ConnectionError, f"only {len(DATA)} of {len(DATA) + 10} bytes came"),
        ("/page", {}, ValueError, "page' is not a picture in a format"),
        ("/slow", {"timeout": 0.3}, TimeoutError, r"slow' did not answer within 0\.3 s; raise timeout="),
        ("/cat.png", {"timeout": 0}, ValueError, "timeout must be above 0"),
    ],
)
def test_a_bad_answer_is_named(server, path, options, error, message):
    with pytest.raises(error, match=message):
        load_image(server.address + path, **options)


def test_an_address_that_never_answers():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/cat.png"
        started = time.monotonic()
        with pytest.raises(TimeoutError, match=rf"'{url}' did not answer within 0\.2 s"):
            load_image(url, timeout=0.2)
        assert time.monotonic() - started < 3


def test_an_address_where_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ConnectionError, match=rf"cannot reach 'http://127\.0\.0\.1:{port}/x'"):
        load_image(f"http://127.0.0.1:{port}/x", timeout=2)


def test_a_server_that_hangs_up():
    with socket.create_server(("127.0.0.1", 0)) as rude:

        def hang_up():
            connection, _ = rude.accept()
            connection.recv(1000)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(ConnectionError, match=r"broke off|cannot reach"):
            load_image(f"http://127.0.0.1:{rude.getsockname()[1]}/x", timeout=2)
        thread.join()


@pytest.mark.parametrize("url", ["http://", "http:///cat.png", "http://[::1/x", "http://host:port/x", "https://a..b/x"])
def test_malformed_addresses(url):
    with pytest.raises(ValueError, match="is not a valid address"):
        load_image(url, timeout=1)
