"""Compares an OpenAI-compatible endpoint's answers with the library's own, on a folder of pictures.

python -m deepseek_vl2.serve.compare --endpoint http://127.0.0.1:8000/v1 --model NAME --model_path M --folder pictures

Both answer greedily. The endpoint may be vLLM, SGLang or this library's own server; for the large engines see
docs/large-engines.md. The last line of the output is the result as JSON. Exit codes: 0; 2 after an error.
"""

import argparse
import base64
import io
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from deepseek_vl2.evaluate.metrics import match_boxes
from deepseek_vl2.serve.grounding import read_grounding
from deepseek_vl2.serve.inference import deepseek_generate
from deepseek_vl2.utils.command_line import DTYPES, OneLineParser
from deepseek_vl2.utils.data_files import write_whole
from deepseek_vl2.utils.errors import USER_ERRORS, run_command
from deepseek_vl2.utils.io import LoadedModel, load_image, load_pretrained_model

PROGRAM = "python -m deepseek_vl2.serve.compare"
KEY_VARIABLE = "OPENAI_API_KEY"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
DEFAULT_PROMPT = "<|grounding|>Describe the picture."
NUM_SHOWN = 5


@dataclass(frozen=True)
class Endpoint:
    """Where an OpenAI-compatible server is asked.

    Attributes:
        url: up to `/v1`.
        model: its id there.
        api_key: sent if there is one.
        timeout: seconds for an answer.
    """

    url: str
    model: str
    api_key: str | None = None
    timeout: float = 300

    def answer(self, picture: Image.Image, prompt: str, max_new_tokens: int) -> str:
        """Asks about one picture.

        Raises:
            ValueError: the endpoint refuses, or answers in another form.
            OSError: it cannot be reached.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": _content(picture, prompt)}],
            "temperature": 0,
            "max_tokens": max_new_tokens,
            "skip_special_tokens": False,  # of vLLM and SGLang; without it the marks of boxes are lost
        }
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return str(json.load(response)["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            with error:
                raise ValueError(f"the endpoint answers HTTP {error.code}: {error.read(500)!r}") from error
        except (KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"the endpoint's answer has another form: {error!r}") from error


def _content(picture: Image.Image, prompt: str) -> list[dict[str, Any]]:
    packed = io.BytesIO()
    picture.save(packed, "PNG")  # the same pixels for both, upright and in RGB
    url = f"data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]


@dataclass(frozen=True)
class ComparedAnswer:
    """One picture's two answers.

    Attributes:
        picture: name of its file.
        library: the library's answer.
        endpoint: the endpoint's.
        ious: of each box of the library with the endpoint's box for it, and 0 for each box that only one of them has.
    """

    picture: str
    library: str
    endpoint: str
    ious: list[float]

    @property
    def is_equal(self) -> bool:
        """Whether both say the same, apart from spaces around it."""
        return self.library.strip() == self.endpoint.strip()


def compare_answers(picture: str, library: str, endpoint: str) -> ComparedAnswer:
    """Compares two answers: their boxes by place, whatever their labels."""
    own = [box.box for box in read_grounding(library).boxes]
    other = [box.box for box in read_grounding(endpoint).boxes]
    ious = match_boxes(other, own) + [0.0] * max(0, len(other) - len(own))
    return ComparedAnswer(picture, library, endpoint, [round(iou, 4) for iou in ious])


def own_answer(loaded: LoadedModel, picture: Image.Image, prompt: str, max_new_tokens: int) -> str:
    """The library's greedy answer."""
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": f"<image>\n{prompt}", "images": [picture]},
        {"role": "assistant", "content": ""},
    ]
    parts = (loaded.model, loaded.processor, loaded.tokenizer)
    pieces = deepseek_generate(messages, *parts, max_length=max_new_tokens, temperature=0, repetition_penalty=1.0)
    return "".join(pieces)


def summarize(answers: Sequence[ComparedAnswer]) -> dict[str, Any]:
    """Counts, rates, and all differences."""
    ious = [iou for answer in answers for iou in answer.ious]
    return {
        "num_pictures": len(answers),
        "exact_match": round(sum(answer.is_equal for answer in answers) / len(answers), 4),
        "num_boxes": len(ious),
        "mean_box_iou": round(sum(ious) / len(ious), 4) if ious else None,
        "differences": [asdict(answer) for answer in answers if not answer.is_equal],
    }


def find_pictures(folder: Path, limit: int | None = None) -> list[Path]:
    """The pictures of a folder, by name.

    Raises:
        OSError: there is no such folder.
        ValueError: it has no pictures.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{folder} has no pictures ({', '.join(sorted(SUFFIXES))})")
    return found[:limit]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(prog=PROGRAM, description="Compare an endpoint's answers with the library's own.")
    parser.add_argument("--endpoint", required=True, metavar="URL", help="up to /v1, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True, help="the model's id at the endpoint")
    parser.add_argument("--model_path", default="nano", help="the same model here: 'nano', a folder or a hub name")
    parser.add_argument("--folder", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help=f"default: {DEFAULT_PROMPT!r}")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="default: 256")
    parser.add_argument("--limit", type=int, help="only the first so many pictures")
    parser.add_argument("--output", type=Path, help="also write the result, with all differences, to this file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; default: auto")
    parser.add_argument("--dtype", choices=DTYPES, help="default: what suits the device")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for an answer; default: 300")
    options = parser.parse_args(arguments)
    for name in ("limit", "max_new_tokens"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} must be at least 1")
    return options


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Asks both about all pictures.

    Raises:
        ValueError: no pictures, a broken one, or the endpoint refuses.
        OSError: the folder, the model or the endpoint cannot be reached.
    """
    paths = find_pictures(options.folder, options.limit)
    loaded = load_pretrained_model(options.model_path, options.dtype, options.device)
    endpoint = Endpoint(options.endpoint, options.model, os.environ.get(KEY_VARIABLE), options.timeout)
    answers = []
    for path in tqdm(paths, desc="Compare", unit="picture"):
        picture = load_image(path)
        there = endpoint.answer(picture, options.prompt, options.max_new_tokens)
        here = own_answer(loaded, picture, options.prompt, options.max_new_tokens)
        answers.append(compare_answers(path.name, here, there))
    return summarize(answers)


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparison; returns its exit code."""
    options = parse_arguments(arguments)
    return run_command(PROGRAM, lambda: _compare_and_tell(options), errors=(*USER_ERRORS, RuntimeError))


def _compare_and_tell(options: argparse.Namespace) -> int:
    result = compare(options)
    if options.output is not None:
        write_whole(options.output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for difference in result["differences"][:NUM_SHOWN]:
        print(f"{difference['picture']}\n  library:  {difference['library']}\n  endpoint: {difference['endpoint']}")
    if len(result["differences"]) > NUM_SHOWN:
        print(f"... and {len(result['differences']) - NUM_SHOWN} more; --output FILE writes all")
    print(json.dumps(result | {"differences": len(result["differences"])}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
