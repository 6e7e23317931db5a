"""Pictures from addresses that strangers name: only from the public internet, and never much or for long.

A host is resolved once, all its addresses are checked, and the connection goes to one of those that were checked; so
neither a name that leads inside nor one that changes its mind in between ("DNS rebinding") gets through. A redirect is
checked as a new address. Proxies of the environment are not used: they would resolve by themselves.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import deepseek_vl2
from deepseek_vl2.models.download import ascii_url, read_limited

MAX_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver: TypeAlias = Callable[[str, int], Sequence[str]]


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host; also those of numbers in decimal, octal or hexadecimal, as the system reads them.

    Raises:
        OSError: there is no such host.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[4][0]) for address in found))


def is_public(address: IpAddress) -> bool:
    """Whether an address belongs to the public internet, and so does every IPv4 address that it stands for."""
    if isinstance(address, ipaddress.IPv6Address):
        embedded = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            embedded.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        inner = [other for other in embedded if other is not None]
        if inner:
            return all(is_public(other) for other in inner)
        if address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


@dataclass(frozen=True)
class PublicFetcher:
    """Downloads from the public internet.

    Attributes:
        max_bytes: largest download.
        timeout: seconds for all pictures of a request, redirects included; the system's own limits for resolving a
            name come on top.
        resolve: finds the addresses of a host.
        is_allowed: decides on each of them. Tests put another one here to reach a server of their own.
    """

    max_bytes: int
    timeout: float = 10.0
    resolve: Resolver = resolve
    is_allowed: Callable[[IpAddress], bool] = is_public

    def deadline(self) -> float:
        """When a request that begins now must have its pictures, in the time of `time.monotonic`."""
        return time.monotonic() + self.timeout

    def fetch(self, url: str, deadline: float | None = None) -> bytes:
        """Downloads what an address answers.

        Args:
            url: the address.
            deadline: of a request with several pictures, see `deadline`; by default a whole `timeout` from now on.

        Raises:
            ValueError: the address or one that it leads to is malformed or not public, or what it answers is an error
                or too large.
            TimeoutError: no whole answer in time.
            ConnectionError: the host refuses, or breaks off.
        """
        if deadline is None:
            deadline = self.deadline()
        for _ in range(MAX_REDIRECTS + 1):
            if time.monotonic() >= deadline:
                raise self._too_late()
            answer = self._answer(url, deadline)
            if isinstance(answer, bytes):
                return answer
            url = answer
        raise ValueError(f"the address redirects more than {MAX_REDIRECTS} times")

    def _too_late(self) -> TimeoutError:
        return TimeoutError(f"the address did not answer within {self.timeout:g} s, which is for all of a request")

    def _answer(self, url: str, deadline: float) -> bytes | str:
        """What an address answers: content, or the address that it redirects to."""
        parts = _checked_parts(url)
        connection = _PinnedConnection(parts, self._checked_addresses(parts), deadline)
        try:
            return self._request(connection, parts, deadline)
        except TimeoutError:
            raise self._too_late() from None
        except (http.client.HTTPException, OSError) as error:
            if time.monotonic() >= deadline:
                raise self._too_late() from None
            raise ConnectionError(f"the address cannot be reached: {type(error).__name__}") from error
        finally:
            connection.close()

    def _request(
        self, connection: "_PinnedConnection", parts: urllib.parse.SplitResult, deadline: float
    ) -> bytes | str:
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        connection.request("GET", path, headers={"User-Agent": f"deepseek_vl2/{deepseek_vl2.__version__}"})
        response = connection.getresponse()
        if response.status in _REDIRECTS:
            target = response.headers.get("Location")
            if not target:
                raise ValueError("the address redirects to nowhere")
            return urllib.parse.urljoin(parts.geturl(), target)
        if response.status != 200:
            raise ValueError(f"the address answers HTTP {response.status}")
        too_late = str(self._too_late())
        too_large = f"the picture at the address is larger than {self.max_bytes} bytes"
        return read_limited(response, deadline, self.max_bytes, too_late, too_large)

    def _checked_addresses(self, parts: urllib.parse.SplitResult) -> list[str]:
        # The same words whether a host does not exist or lies inside: nobody finds out about names inside.
        refusal = ValueError("the address does not lead to a host on the public internet")
        try:
            addresses = self.resolve(parts.hostname or "", parts.port or _PORTS[parts.scheme])
            allowed = [self.is_allowed(ipaddress.ip_address(address.partition("%")[0])) for address in addresses]
        except (OSError, ValueError):
            raise refusal from None
        if not allowed or not all(allowed):
            raise refusal
        return list(addresses)


def _checked_parts(url: str) -> urllib.parse.SplitResult:
    parts = urllib.parse.urlsplit(ascii_url(url))
    if parts.scheme not in _PORTS:
        raise ValueError("only http: and https: addresses are fetched")
    if parts.username is not None or parts.password is not None:
        raise ValueError("the address holds a user or a password; only open addresses are fetched")
    return parts


class _PinnedConnection(http.client.HTTPConnection):
    """A connection to an address that was checked, for the host that it was found for; it ends at the deadline."""

    def __init__(self, parts: urllib.parse.SplitResult, addresses: Sequence[str], deadline: float) -> None:
        port = parts.port or _PORTS[parts.scheme]
        self.default_port = _PORTS[parts.scheme]
        super().__init__(parts.hostname or "", port)
        self._is_encrypted = parts.scheme == "https"
        self._addresses = addresses
        self._deadline = deadline
        self._end: threading.Timer | None = None

    def connect(self) -> None:
        """Connects to the first address that answers."""
        errors: list[OSError] = []
        for address in self._addresses:
            try:
                self.sock = socket.create_connection((address, self.port), timeout=self._remaining())
                break
            except OSError as error:
                errors.append(error)
        else:
            raise errors[-1]
        if self._is_encrypted:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
        # The timeout of a socket is for one wait only: whoever sends a byte now and then would never end.
        self._end = threading.Timer(self._remaining(), _shut, [self.sock])
        self._end.daemon = True
        self._end.start()

    def close(self) -> None:
        """Ends the connection."""
        if self._end is not None:
            self._end.cancel()
        super().close()

    def _remaining(self) -> float:
        return max(self._deadline - time.monotonic(), 0.001)


def _shut(connected: socket.socket) -> None:
    try:
        socket.socket.shutdown(connected, socket.SHUT_RDWR)  # not TLS's own, which would break the reader's state
    except OSError:
        return  # it was closed in the meantime
