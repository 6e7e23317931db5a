"""Many clients for minutes against the server: no answer is lost or mixed up, memory stays flat.

python -m benchmarks.api_load                      starts a server with nano, 50 clients for 5 minutes
python -m benchmarks.api_load --url http://127.0.0.1:8000/v1 --model NAME --pid 1234

Every question is asked alone first. Then each client asks them in an order of its own, some as streams, and goes away
in the midst of some, which must not block a place. The last line is the result as JSON. Exit code 1 if anything was
wrong. Needs the extras api and test.
"""

import base64
import io
import json
import random
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from PIL import Image, ImageDraw

from deepseek_vl2.utils.command_line import OneLineParser

COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "black", "pink")
QUESTIONS = ("What color is the circle?", "<|ref|>The circle.<|/ref|>.", "How many objects are there?")
MAX_TOKENS = 48
STREAM_SHARE, LEAVE_SHARE = 0.4, 0.1
SECONDS_BETWEEN_SAMPLES = 5.0
FREE_WITHIN_SECONDS = 1.0
# Growth of memory that caches and allocators explain; what leaks goes on.
MAX_GROWTH_MB = 150


def scene(colour: str, number: int) -> str:
    """Data URI of a circle; its place tells scenes of one colour apart."""
    picture = Image.new("RGB", (160, 160), "white")
    left = 20 + 10 * number
    ImageDraw.Draw(picture).ellipse((left, 30, left + 60, 90), fill=colour)
    packed = io.BytesIO()
    picture.save(packed, "PNG")
    return f"data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}"


def questions() -> list[list[dict[str, object]]]:
    """Messages of all questions, all different."""
    return [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": scene(colour, number)}},
                    {"type": "text", "text": text},
                ],
            }
        ]
        for number, text in enumerate(QUESTIONS)
        for colour in COLOURS
    ]


@contextmanager
def started_server() -> Iterator[tuple[str, int]]:
    """A server with nano, in float32 so that batches do not change the rounding of answers; address and process id."""
    command = [sys.executable, "-m", "deepseek_vl2.serve.api", "--port", "0", "--dtype", "float32"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        line = server.stdout.readline() if server.stdout else ""
        if not line:
            raise SystemExit("the server did not start; run it by hand to see why")
        yield line.split()[-1], server.pid
    finally:
        server.terminate()
        server.wait(60)


class Load:
    """What the clients share."""

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.model = model
        self.questions = questions()
        self.expected: list[str] = []
        self.counts: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.problems: list[str] = []
        self._lock = threading.Lock()

    def client(self) -> openai.OpenAI:
        """A connection pool of one client."""
        return openai.OpenAI(base_url=self.url, api_key="any", max_retries=20, timeout=600)

    def ask(self, client: openai.OpenAI, number: int, stream: bool = False) -> str:
        """The whole answer to a question."""
        options: dict[str, Any] = {"model": self.model, "messages": self.questions[number], "temperature": 0}
        options["max_tokens"] = MAX_TOKENS
        if not stream:
            return client.chat.completions.create(**options).choices[0].message.content
        chunks = client.chat.completions.create(**options, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def leave(self, client: openai.OpenAI, number: int) -> None:
        """Goes away after the first word."""
        options: dict[str, Any] = {"model": self.model, "messages": self.questions[number], "max_tokens": MAX_TOKENS}
        with client.chat.completions.create(**options, stream=True) as chunks:
            next(iter(chunks), None)

    def run_client(self, seed: int, end: float) -> None:
        """Asks until the time is over."""
        chance, client = random.Random(seed), self.client()
        while time.monotonic() < end:
            number, start = chance.randrange(len(self.questions)), time.monotonic()
            kind = "asked"
            try:
                if chance.random() < LEAVE_SHARE:
                    kind = "left"
                    self.leave(client, number)
                else:
                    answer = self.ask(client, number, stream=chance.random() < STREAM_SHARE)
                    if answer != self.expected[number]:
                        self.note("mixed", f"question {number}: {answer!r}, alone {self.expected[number]!r}")
            except openai.OpenAIError as error:
                self.note("lost", f"question {number}: {error}")
            with self._lock:
                self.counts[kind] += 1
                if kind == "asked":
                    self.seconds.append(time.monotonic() - start)

    def note(self, kind: str, problem: str) -> None:
        """Remembers what went wrong."""
        with self._lock:
            self.counts[kind] += 1
            self.problems.append(problem)


def memory_mb(pid: int | None) -> float | None:
    """Memory of a process, on Linux."""
    path = Path(f"/proc/{pid}/status")
    if pid is None or not path.exists():
        return None
    (line,) = [line for line in path.read_text().splitlines() if line.startswith("VmRSS")]
    return round(int(line.split()[1]) / 1024, 1)


def open_answers(url: str) -> float:
    """Places that are taken, by the server's own figures."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith("deepseek_vl2_open_answers "))


def seconds_until_free(url: str) -> float:
    """Seconds until no place is taken any more."""
    start = time.monotonic()
    while open_answers(url) and time.monotonic() - start < 60:
        time.sleep(0.02)
    return round(time.monotonic() - start, 2)


def run(load: Load, num_clients: int, minutes: float, pid: int | None) -> dict[str, Any]:
    """Lets all clients ask, and watches the memory."""
    single = load.client()
    load.expected = [load.ask(single, number) for number in range(len(load.questions))]
    print(f"{len(set(load.expected))} different answers to {len(load.questions)} questions asked alone")
    start = time.monotonic()
    end = start + 60 * minutes
    threads = [threading.Thread(target=load.run_client, args=(seed, end)) for seed in range(num_clients)]
    for thread in threads:
        thread.start()
    samples = []
    while time.monotonic() < end:
        time.sleep(min(SECONDS_BETWEEN_SAMPLES, max(end - time.monotonic(), 0.01)))
        samples.append(memory_mb(pid))
        print(f"{time.monotonic() - start:6.0f} s  {dict(load.counts)}  {samples[-1]} MB", flush=True)
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - start
    free_after = seconds_until_free(load.url)
    # The first third warms up: caches of picture features and of the allocator fill.
    settled = [sample for sample in samples[len(samples) // 3 :] if sample is not None]
    return {
        "clients": num_clients,
        "seconds": round(seconds, 1),
        **{kind: load.counts[kind] for kind in ("asked", "left", "lost", "mixed")},
        "answers_per_second": round(load.counts["asked"] / seconds, 2),
        "median_seconds": round(statistics.median(load.seconds), 3) if load.seconds else None,
        "longest_seconds": round(max(load.seconds, default=0), 3),
        "free_after_seconds": free_after,
        "memory_mb": settled[:: max(1, len(settled) // 8)],
        "memory_growth_mb": round(settled[-1] - settled[0], 1) if settled else None,
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the load; returns the exit code."""
    parser = OneLineParser(
        prog="python -m benchmarks.api_load",
        description="Many clients for minutes against the OpenAI-compatible server.",
    )
    parser.add_argument("--url", help="up to /v1; default: a server with nano is started")
    parser.add_argument("--model", default="nano", help="the model's id there; default: nano")
    parser.add_argument("--pid", type=int, help="process of the server at --url, to watch its memory")
    parser.add_argument("--clients", type=int, default=50, help="default: 50")
    parser.add_argument("--minutes", type=float, default=5, help="default: 5")
    options = parser.parse_args(arguments)
    if options.url:
        load = Load(options.url.rstrip("/"), options.model)
        result = run(load, options.clients, options.minutes, options.pid)
    else:
        with started_server() as (url, pid):
            load = Load(url, options.model)
            result = run(load, options.clients, options.minutes, pid)
    for problem in load.problems[:10]:
        print(problem)
    print(json.dumps(result))
    is_flat = result["memory_growth_mb"] is None or result["memory_growth_mb"] < MAX_GROWTH_MB
    is_right = not load.problems and is_flat and result["free_after_seconds"] <= FREE_WITHIN_SECONDS
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
