"""What a server is started with."""

from dataclasses import dataclass, field

from deepseek_vl2.serve.picture_limits import MEGABYTE, PictureLimits


@dataclass(frozen=True)
class ServerSettings:
    """How the server serves.

    Attributes:
        model_name: the model's id for clients.
        api_keys: one of them is asked for; none: everybody is served.
        limits: of the pictures of a request.
        max_body_mb: size of a request.
        allow_url_fetch: whether pictures are fetched from public addresses.
        max_batch: answers at the same time.
        max_waiting: answers that wait for their turn.
        max_open_per_client: answers of one client under way or waiting.
        timeout: seconds for a request, from its start to the end of its answer.
        chunk_size: tokens of a prompt to read at once, -1 for all.
    """

    model_name: str = "nano"
    api_keys: tuple[str, ...] = ()
    limits: PictureLimits = field(default_factory=PictureLimits)
    max_body_mb: float = 32
    allow_url_fetch: bool = False
    max_batch: int = 8
    max_waiting: int = 64
    max_open_per_client: int = 72
    timeout: float = 300
    chunk_size: int = -1

    @property
    def max_body_bytes(self) -> int:
        """Size of a request in bytes."""
        return int(self.max_body_mb * MEGABYTE)
