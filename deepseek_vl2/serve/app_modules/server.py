"""Puts model, page and web server together."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from deepseek_vl2.serve.app_modules.engine import Answerer, Engine, LoadState
from deepseek_vl2.serve.app_modules.limits import MEGABYTE, UploadLimits
from deepseek_vl2.serve.app_modules.logs import LOGGER_NAME, configure_logger
from deepseek_vl2.serve.app_modules.page import Demo
from deepseek_vl2.serve.app_modules.settings import Settings
from deepseek_vl2.serve.examples import available_examples

logger = logging.getLogger(LOGGER_NAME)

ASSETS = Path(__file__).parent.parent / "assets"


@dataclass(frozen=True)
class ServerOptions:
    """What is served, and how.

    Attributes:
        model_path: `"nano"`, a checkpoint folder or a name on the hub.
        model_name: what the page calls it.
        device: where the model runs.
        dtype: type of its weights; None for what suits the device.
        chunk_size: what the page's setting begins with.
        concurrency: answers at the same time.
        max_image_mb: largest upload.
        max_cache_mb: memory for the caches of conversations between their turns.
        pictures: folder of the example pictures.
        folder: for pictures with boxes; gradio's own folder, so that it serves them and deletes old ones.
        log_file: where the log goes, beside standard error.
        log_content: whether questions and answers are logged.
        quantize: `"int8"`, `"int4"`, or None for the weights as they are.
        compile: whether to use torch.compile.
    """

    model_path: str
    model_name: str
    device: str
    dtype: str | None
    chunk_size: int
    concurrency: int
    max_image_mb: float
    max_cache_mb: float
    pictures: Path
    folder: Path
    log_file: str | None = None
    log_content: bool = False
    quantize: str | None = None
    compile: bool = False


def build_demo(options: ServerOptions) -> Demo:
    """Make the demo; the model is loaded later."""
    configure_logger(options.log_file)
    limits = UploadLimits(options.max_image_mb)

    def load(set_state: Callable[[LoadState], None]) -> Answerer:
        # Here and not above: torch and the models take longer to import than the page to come up.
        from deepseek_vl2.serve.app_modules.answering import ModelOptions, load_answerer

        max_cache_bytes = int(options.max_cache_mb * MEGABYTE)
        model = ModelOptions(
            options.model_path,
            options.dtype,
            options.device,
            max_cache_bytes,
            quantize=options.quantize,
            compile=options.compile,
        )
        return load_answerer(model, limits, options.folder, set_state)

    return Demo(
        Engine(load, options.concurrency),
        options.model_name,
        limits,
        _served_copies(options.pictures, options.folder),
        Settings(chunk_size=options.chunk_size),
        options.log_content,
    )


def _served_copies(pictures: Path, folder: Path) -> Path:
    """Copy the example pictures to where gradio serves files from; it serves no others of this machine."""
    copies = folder / "examples"
    copies.mkdir(parents=True, exist_ok=True)
    for name in {name for example in available_examples(pictures) for name in example.pictures}:
        shutil.copyfile(pictures / name, copies / name)
    return copies


def launch(demo: Demo, **addresses: Any) -> gr.Blocks:
    """Serve the page, in threads of its own.

    Args:
        demo: what to serve.
        **addresses: for gradio's `launch`: `server_name`, `server_port`, `root_path`, `share`, `auth`.

    Raises:
        OSError: the port is taken.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)
    demo.root_path = addresses.get("root_path") or ""
    blocks = demo.build()
    blocks.queue(default_concurrency_limit=None, api_open=False)  # past the queue no session would have a name
    blocks.launch(
        **addresses,
        prevent_thread_lock=True,
        quiet=True,
        max_file_size=demo.limits.max_bytes,
        show_error=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=_theme(),
        css_paths=[ASSETS / "page.css"],
        head=f"<script>{(ASSETS / 'page.js').read_text(encoding='utf-8')}</script>",
    )
    logger.info("the page is at %s", blocks.local_url)
    if blocks.share_url:
        logger.warning("the page is open to the internet at %s", blocks.share_url)
    return blocks


def _theme() -> gr.themes.Base:
    """Fonts of the user's own machine, and colours with enough contrast for everybody."""
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return theme.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
    )
