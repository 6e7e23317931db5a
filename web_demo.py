"""Serves a page on which a DeepSeek-VL2 model is asked about pictures.

python web_demo.py                                                 the bundled model, http://127.0.0.1:7860
python web_demo.py --model_name deepseek-ai/deepseek-vl2-tiny      a published model
python web_demo.py --local_path runs/mine --auth me:secret --ip 0.0.0.0

Exit codes: 0; 2 after an error that the user can mend.
"""

import argparse
import contextlib
import errno
import logging
import math
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from deepseek_vl2.utils.command_line import DTYPES, QUANTIZATIONS, OneLineParser

PICTURES = Path(__file__).parent / "images"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(prog="web_demo.py", description="Serve a page for a DeepSeek-VL2 model.")
    parser.add_argument("--model_name", default="nano", help="'nano' (bundled) or a name on the hub; default: nano")
    parser.add_argument("--local_path", metavar="FOLDER", help="a checkpoint folder, in place of the name")
    parser.add_argument("--chunk_size", type=int, default=-1, help="tokens to prefill at once; default -1: all")
    parser.add_argument("--ip", default="127.0.0.1", help="address to serve at; default: 127.0.0.1, this machine only")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860; 0: any that is free")
    parser.add_argument("--root_path", default="", help="path in front of the page, behind a proxy, such as /demo")
    parser.add_argument("--lazy_load", action="store_true", help="load the model with the first question")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; default: auto")
    parser.add_argument("--dtype", choices=DTYPES, help="default: what suits the device")
    parser.add_argument("--quantize", choices=QUANTIZATIONS, help="hold the weights in 8 or 4 bits: less memory")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile: the first answers take minutes, later ones less"
    )
    parser.add_argument("--share", action="store_true", help="open the page to the internet through gradio's servers")
    parser.add_argument(
        "--auth", action="append", default=[], metavar="USER:PASSWORD", help="ask for a login; may be given repeatedly"
    )
    parser.add_argument("--max-image-mb", type=float, default=20, help="largest upload in megabytes; default: 20")
    parser.add_argument(
        "--max-cache-mb",
        type=float,
        default=1024,
        help="memory for what was read of conversations, in megabytes; 0 reads all at every turn; default: 1024",
    )
    parser.add_argument("--concurrency", type=int, default=1, help="answers at the same time; default: 1")
    parser.add_argument("--log_file", metavar="FILE", help="also write the log there")
    parser.add_argument("--log_content", action="store_true", help="also log what is asked and answered")
    return parser.parse_args(arguments)


def check_arguments(options: argparse.Namespace) -> None:
    """Refuses what cannot work before anything is loaded.

    Raises:
        ValueError: If a number is out of range, or a login has no user or password.
        OSError: If the folder is not there.
    """
    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port {options.port} must be 0 to 65535")
    if options.concurrency < 1:
        raise ValueError(f"--concurrency {options.concurrency} must be at least 1")
    if not 0 < options.max_image_mb < math.inf:
        raise ValueError(f"--max-image-mb {options.max_image_mb} must be above 0")
    if not 0 <= options.max_cache_mb < math.inf:
        raise ValueError(f"--max-cache-mb {options.max_cache_mb} must be at least 0")
    if options.chunk_size == 0 or not -1 <= options.chunk_size <= 4096:
        raise ValueError(f"--chunk_size {options.chunk_size} must be 1 to 4096, or -1 for the whole prompt at once")
    if options.local_path is not None and not (Path(options.local_path) / "config.json").is_file():
        raise FileNotFoundError(f"--local_path {options.local_path} is not a model folder: it has no config.json")
    logins(options.auth)


def logins(pairs: list[str]) -> list[tuple[str, str]]:
    """Reads user and password of each login.

    Raises:
        ValueError: If one is missing; the message does not show it.
    """
    split = [tuple(pair.split(":", 1)) for pair in pairs]
    if any(len(pair) != 2 or not all(pair) for pair in split):
        raise ValueError("--auth must be USER:PASSWORD, both not empty")
    return [(user, password) for user, password in split]


def check_address(ip: str, port: int) -> None:
    """Refuses an address that cannot be had, before anything large is imported.

    Raises:
        OSError: If the port is in use, or the address is none of this machine.
    """
    for host in (ip, "127.0.0.1"):  # whatever the address, gradio wants to have the port there too
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                if os.name == "posix":  # as servers do: a port that was left a moment ago is free
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise OSError(f"--port {port} is in use; take another, or 0 for any that is free") from error
            raise OSError(f"--ip {ip} --port {port} cannot be served: {error.strerror}") from error


def serve(options: argparse.Namespace, folder: Path) -> None:
    """Builds the page and serves it until it is interrupted.

    Args:
        options: the command line.
        folder: for uploads and pictures with boxes; whoever calls deletes it.
    """
    ip = options.ip.strip("[]")
    check_address(ip, options.port)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # read when gradio is imported
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from deepseek_vl2.serve.app_modules.server import ServerOptions, build_demo, launch

    server_options = ServerOptions(
        model_path=options.local_path or options.model_name,
        model_name=Path(options.local_path).name if options.local_path else options.model_name,
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        compile=options.compile,
        chunk_size=options.chunk_size,
        concurrency=options.concurrency,
        max_image_mb=options.max_image_mb,
        max_cache_mb=options.max_cache_mb,
        pictures=PICTURES,
        folder=folder,
        log_file=options.log_file,
        log_content=options.log_content,
    )
    demo = build_demo(server_options)
    addresses: dict[str, Any] = {
        "server_name": f"[{ip}]" if ":" in ip else ip,  # gradio makes an address for browsers of it
        "server_port": options.port or None,
        "root_path": options.root_path,
        "share": options.share,
        "auth": logins(options.auth) or None,
    }
    try:
        launch(demo, **addresses)
        if not options.lazy_load:
            demo.engine.start_loading()
        threading.Event().wait()
    finally:
        demo.engine.close()


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Ends as Ctrl-C does, with uploads deleted, when a service manager or `kill` ends the process."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def leave(code: int) -> NoReturn:
    """Ends the process, also in the middle of a load: that cannot be interrupted, and Python would wait for its end."""
    for thread in threading.enumerate():
        if thread.name.startswith("deepseek_vl2-loader"):  # the engine's
            thread.join(1)  # one that loads nothing ends by itself
            if thread.is_alive():
                logging.shutdown()
                os._exit(code)
    sys.exit(code)


def main(arguments: list[str] | None = None) -> int:
    """Runs the server; returns its exit code."""
    options = parse_arguments(arguments)
    try:
        check_arguments(options)
        if (options.share or options.ip.strip("[]") not in ("127.0.0.1", "localhost", "::1")) and not options.auth:
            print(
                "web_demo.py: warning: others can reach this page; --auth USER:PASSWORD asks for a login",
                file=sys.stderr,
            )
        folders = tempfile.TemporaryDirectory(prefix="deepseek_vl2-web-", ignore_cleanup_errors=True)
        with sigterm_as_interrupt(), folders as folder:
            serve(options, Path(folder))
    except KeyboardInterrupt:
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"web_demo.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    leave(main())
