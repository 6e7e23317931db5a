"""Serves a DeepSeek-VL2 model to OpenAI clients: `python -m deepseek_vl2.serve.api --model_path M`.

Exit codes: 0 after an interrupt; 2 after an error that the user can mend.
"""

import argparse
import logging
import math
import os
import socket
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path

from deepseek_vl2.serve.picture_limits import PictureLimits
from deepseek_vl2.utils.command_line import DTYPES, QUANTIZATIONS, OneLineParser

PROGRAM = "python -m deepseek_vl2.serve.api"
KEY_VARIABLE = "DEEPSEEK_VL2_API_KEY"
SHUTDOWN_SECONDS = 30
_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(prog=PROGRAM, description="Serve a DeepSeek-VL2 model to OpenAI clients.")
    add = parser.add_argument
    add(
        "--model_path", default="nano", help="'nano' (bundled), a checkpoint folder or a name on the hub; default: nano"
    )
    add(
        "--served_model_name", metavar="NAME", help="the model's id for clients; default: the name or the folder's name"
    )
    add("--host", default="127.0.0.1", help="address to serve at; default: 127.0.0.1, this machine only")
    add("--port", type=int, default=8000, help="default: 8000; 0: any that is free")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; default: auto")
    add("--dtype", choices=DTYPES, help="default: what suits the device")
    add("--quantize", choices=QUANTIZATIONS, help="hold the weights in 8 or 4 bits: less memory")
    add("--compile", action="store_true", help="torch.compile: the first answers take minutes, later ones less")
    add("--chunk_size", type=int, default=-1, help="tokens of a prompt to read at once; default -1: all")
    add("--max_batch", type=int, default=8, help="answers at the same time; default: 8")
    add("--max_waiting", type=int, default=64, help="answers that may wait for their turn; default: 64")
    add("--max_per_client", type=int, help="answers of one client under way or waiting; default: no limit of its own")
    add("--timeout", type=float, default=300, help="seconds for a request; default: 300")
    add("--max_body_mb", type=float, default=32, help="largest request in megabytes; default: 32")
    add("--max_image_mb", type=float, default=20, help="largest picture in megabytes; default: 20")
    add("--max_pixels", type=int, default=PictureLimits.max_pixels, help="largest picture; default: 40 million")
    add("--max_pictures", type=int, default=PictureLimits.max_pictures, help="pictures of a request; default: 10")
    add("--allow_url_fetch", action="store_true", help="fetch pictures from addresses, of the public internet only")
    add(
        "--api_key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"ask clients for this key; may be given repeatedly. Or in the variable {KEY_VARIABLE}, divided by commas",
    )
    return parser.parse_args(arguments)


def check_arguments(options: argparse.Namespace) -> None:
    """Refuses what cannot work before anything is loaded.

    Raises:
        ValueError: a number is out of range, or a key is empty.
    """
    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port {options.port} must be 0 to 65535")
    for name in ("max_batch", "max_pixels", "max_pictures"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least 1")
    if options.max_waiting < 0:
        raise ValueError(f"--max_waiting {options.max_waiting} must be at least 0")
    if options.max_per_client is not None and options.max_per_client < 1:
        raise ValueError(f"--max_per_client {options.max_per_client} must be at least 1")
    if options.chunk_size == 0 or options.chunk_size < -1:
        raise ValueError(f"--chunk_size {options.chunk_size} must be at least 1, or -1 for the whole prompt at once")
    for name in ("timeout", "max_body_mb", "max_image_mb"):
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"--{name} {getattr(options, name)} must be above 0")
    if not all(key.strip() and key.isascii() for key in api_keys(options)):
        raise ValueError("an API key is empty or has letters that a header cannot hold")


def api_keys(options: argparse.Namespace) -> tuple[str, ...]:
    """The keys of the command line, or those of the environment."""
    if options.api_key:
        return tuple(options.api_key)
    variable = os.environ.get(KEY_VARIABLE)
    return tuple(key.strip() for key in variable.split(",")) if variable else ()


def serve(options: argparse.Namespace) -> None:
    """Loads the model and serves it until it is interrupted.

    Raises:
        ValueError: as in `load_pretrained_model`, like its other errors.
        OSError: the address cannot be used.
    """
    # Bound first: who has mistaken the port need not wait for the model.
    listening = socket.create_server((options.host, options.port), family=_family(options.host))
    with listening:
        import uvicorn

        from deepseek_vl2.serve.api.app import create_app
        from deepseek_vl2.serve.api.service import ChatService
        from deepseek_vl2.serve.api.settings import ServerSettings
        from deepseek_vl2.utils.hardware import use_chosen_num_threads
        from deepseek_vl2.utils.io import load_pretrained_model

        use_chosen_num_threads()
        loaded = load_pretrained_model(
            options.model_path,
            options.dtype,
            options.device,
            quantize=options.quantize,
            pack=not options.compile,
            compile=options.compile,
        )
        max_open = options.max_batch + options.max_waiting
        settings = ServerSettings(
            model_name=options.served_model_name or model_name(options.model_path),
            api_keys=api_keys(options),
            limits=PictureLimits(options.max_image_mb, options.max_pixels, options.max_pictures),
            max_body_mb=options.max_body_mb,
            allow_url_fetch=options.allow_url_fetch,
            max_batch=options.max_batch,
            max_waiting=options.max_waiting,
            max_open_per_client=options.max_per_client or max_open,
            timeout=options.timeout,
            chunk_size=options.chunk_size,
        )
        config = uvicorn.Config(
            create_app(ChatService(loaded, settings)),
            log_config=None,
            access_log=False,  # the server writes its own line for a request, without what users sent
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
        host, port = listening.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        print(f"{settings.model_name} at http://{address}/v1", flush=True)
        uvicorn.Server(config).run(sockets=[listening])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def model_name(path: str) -> str:
    """The id of a model for clients: a folder's last name, or the name on the hub."""
    return Path(path).resolve().name if Path(path).is_dir() else path


class WithoutContent(logging.Filter):
    """Leaves the words of unexpected errors out of the log: they may hold what users wrote."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Replaces error and traceback by type and place."""
        if record.exc_info and record.exc_info[0] is not None:
            kind, _, trace = record.exc_info
            frames = traceback.extract_tb(trace)
            place = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
            record.msg, record.args = f"unexpected error: {kind.__name__}{place}", ()
            record.exc_info = record.exc_text = None
        return True


def main(arguments: list[str] | None = None) -> int:
    """Runs the server; returns its exit code."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format=_LOG_FORMAT)
    logging.getLogger("uvicorn.error").addFilter(WithoutContent())
    try:
        check_arguments(options)
        missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
        if missing:
            raise ImportError(f"{', '.join(missing)} missing: python -m pip install 'deepseek_vl2[api]'")
        if options.host not in ("127.0.0.1", "localhost", "::1") and not api_keys(options):
            print(f"{PROGRAM}: warning: others can reach this server; --api_key asks for a key", file=sys.stderr)
        serve(options)
    except KeyboardInterrupt:
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
