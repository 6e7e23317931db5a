"""Bytes from addresses: `http(s):` with limits on time, size and redirects; data URIs; `file:` addresses."""

import base64
import binascii
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import deepseek_vl2

_MAX_REDIRECTS = 5
_PIECE = 64 * 1024


class _LimitedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows few redirects, and only to http and https."""

    max_redirections = _MAX_REDIRECTS

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme not in ("http", "https"):
            raise ValueError(f"{req.full_url!r} redirects to a {scheme!r} address; only http and https are followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str, *, timeout: float, max_bytes: int) -> bytes:
    """Download what an http(s) address answers. Proxies of the environment are used.

    Args:
        url: the address; spaces and letters outside ASCII are quoted.
        timeout: seconds for the answer to begin, and for it to be complete.
        max_bytes: largest answer.

    Raises:
        TimeoutError: no whole answer in time.
        ConnectionError: the host is not known, refuses, or breaks off.
        ValueError: a malformed address, an HTTP error, too many redirects, or too large an answer.
    """
    if timeout <= 0:
        raise ValueError(f"timeout must be above 0 seconds, got {timeout}")
    request = urllib.request.Request(ascii_url(url), headers={"User-Agent": f"deepseek_vl2/{deepseek_vl2.__version__}"})
    opener = urllib.request.build_opener(_LimitedRedirects)
    deadline = time.monotonic() + timeout
    too_late = f"{url!r} did not answer within {timeout:g} s; raise timeout=, or download it and pass the file"
    too_large = f"{url!r} is larger than {max_bytes} bytes; raise max_bytes= if it is meant"
    try:
        with opener.open(request, timeout=timeout) as response:
            return read_limited(response, deadline, max_bytes, too_late, too_large)
    except urllib.error.HTTPError as error:
        with error:
            raise ValueError(f"{url!r} answered HTTP {error.code}: {error.reason}") from error
    except TimeoutError as error:
        raise TimeoutError(too_late) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise TimeoutError(too_late) from error
        raise ConnectionError(f"cannot reach {url!r}: {error.reason}") from error
    except http.client.InvalidURL as error:
        raise ValueError(f"{url!r} is not a valid address: {error}") from error
    except (http.client.HTTPException, ConnectionError) as error:
        raise ConnectionError(f"the connection to {url!r} broke off: {error or type(error).__name__}") from error


def ascii_url(url: str) -> str:
    """Write an address in ASCII: letters of the host as IDNA, others quoted; without its fragment.

    Raises:
        ValueError: it names no host, or is malformed.
    """
    try:
        parts = urllib.parse.urlsplit(url.strip())
        if not parts.hostname:
            raise ValueError("it names no host")
        netloc = parts.netloc.encode("idna").decode("ascii")
    except ValueError as error:
        raise ValueError(f"{url!r} is not a valid address: {error}") from error
    safe = "%/:=&?~+!$,;'@()*[]"
    path, query = (urllib.parse.quote(piece, safe=safe) for piece in (parts.path, parts.query))
    return urllib.parse.urlunsplit((parts.scheme, netloc, path, query, ""))


def read_limited(
    response: http.client.HTTPResponse, deadline: float, max_bytes: int, too_late: str, too_large: str
) -> bytes:
    """Read an answer within limits.

    Args:
        response: the answer, its body not read yet.
        deadline: by `time.monotonic`.
        max_bytes: largest body.
        too_late: the error's words if the deadline passes.
        too_large: the error's words if there is more.

    Raises:
        TimeoutError: the deadline passes.
        ConnectionError: less comes than was announced.
        ValueError: there is more than `max_bytes`.
    """
    if response.length is not None and response.length > max_bytes:
        raise ValueError(too_large)
    expected = response.length
    data = bytearray()
    while piece := response.read1(_PIECE):  # at most one wait on the socket, so that the deadline is seen
        data += piece
        if len(data) > max_bytes:
            raise ValueError(too_large)
        if time.monotonic() > deadline:
            raise TimeoutError(too_late)
    if expected is not None and len(data) < expected:
        raise ConnectionError(f"only {len(data)} of {expected} bytes came")
    return bytes(data)


def data_uri_bytes(uri: str) -> bytes:
    """Decode a data URI, base64 or percent-encoded (RFC 2397).

    Raises:
        ValueError: no comma, or broken base64.
    """
    head, comma, body = uri.partition(",")
    if not comma:
        raise ValueError(f"the data URI {uri[:60]!r} has no comma: expected data:[type][;base64],data")
    data = urllib.parse.unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return data
    packed = b"".join(data.split())
    try:
        return base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"the data URI {head[:60]!r} holds broken base64: {error}") from error


def local_path(url: str) -> Path:
    """Turn a `file:` address into a path.

    Raises:
        ValueError: it names another machine.
    """
    parts = urllib.parse.urlsplit(url, allow_fragments=False)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"{url!r} names the machine {parts.netloc!r}; only local files can be opened: file:///path")
    return Path(urllib.request.url2pathname(parts.path + (f"?{parts.query}" if parts.query else "")))
