"""Asks a DeepSeek-VL2 model about pictures, from the command line.

python inference.py                                        the bundled example, with the bundled model
python inference.py --image a.jpg --prompt "<|ref|>the red circle<|/ref|>."
python inference.py --model_path deepseek-ai/deepseek-vl2-tiny --image a.jpg b.jpg --prompt "What differs?"
python inference.py --image a.jpg --prompt "<|ref|>the star<|/ref|>." --follow_up "What color is it?"
torchrun --nproc-per-node 2 inference.py --tp --model_path deepseek-ai/deepseek-vl2-small    # one model on two devices

The answer goes to standard output, everything else to standard error. Exit codes: 0; 2 after an error that the user can
mend; 130 when interrupted.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from deepseek_vl2.models.generation import check_chunk_size
from deepseek_vl2.models.quantization import check_quantization
from deepseek_vl2.models.special_tokens import ASSISTANT, IMAGE, REF_END, REF_START, USER
from deepseek_vl2.serve.chat_session import ChatSession
from deepseek_vl2.serve.grounding import GroundedBox, GroundingResult, draw_boxes, read_grounding, save_drawing
from deepseek_vl2.serve.inference import MAX_ADVISED_TEMPERATURE, deepseek_generate, load_model, sampling_options
from deepseek_vl2.serve.questions import DESCRIBE_PICTURE, place_image_marks
from deepseek_vl2.serve.streaming import AnswerStream
from deepseek_vl2.utils.command_line import DTYPES, QUANTIZATIONS, OneLineParser
from deepseek_vl2.utils.errors import USER_ERRORS, can_be_mended, describe_error
from deepseek_vl2.utils.hardware import use_chosen_num_threads
from deepseek_vl2.utils.io import load_image, resolve_device
from deepseek_vl2.utils.processes import (
    common_seed,
    is_first_process,
    is_first_to_fail,
    only_first_process_speaks,
    sharing_options,
)

EXAMPLE_IMAGE = Path(__file__).parent / "images" / "visual_grounding_1.jpeg"
EXAMPLE_PROMPT = f"{REF_START}the red star{REF_END}."
OUTPUT_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_SEED = 2**63 - 1
MORE_MEMORY = "--chunk_size 512, fewer or smaller pictures, or --device cpu"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = OneLineParser(prog="inference.py", description="Ask a DeepSeek-VL2 model about pictures.")
    parser.add_argument(
        "--model_path", default="nano", help="'nano' (bundled), a checkpoint folder or a name on the hub; default: nano"
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="what fine-tuning made of that model with LoRA")
    parser.add_argument("--image", nargs="+", action="extend", metavar="PICTURE", help="paths or addresses of pictures")
    parser.add_argument(
        "--prompt", help=f"the question; {IMAGE} marks the places of the pictures, which stand in front otherwise"
    )
    parser.add_argument(
        "--follow_up",
        nargs="+",
        action="extend",
        default=[],
        metavar="QUESTION",
        help="asked after the answer, in the same conversation; the pictures are not read again",
    )
    parser.add_argument(
        "--chunk_size", type=int, default=-1, help="tokens to prefill at once, for less memory; default -1: all"
    )
    parser.add_argument("--max_new_tokens", type=int, default=512, help="length of the answer; default: 512")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help=f"0 is greedy, at best up to {MAX_ADVISED_TEMPERATURE}; default: 0",
    )
    parser.add_argument("--top_p", type=float, default=0.9, help="used with a temperature; default: 0.9")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1: fewer repetitions; default: 1")
    parser.add_argument("--seed", type=int, default=None, help="for repeatable sampling")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; default: auto")
    parser.add_argument("--dtype", choices=DTYPES, help="default: what suits the device")
    parser.add_argument(
        "--quantize", choices=QUANTIZATIONS, help="hold the weights in 8 or 4 bits: less memory, faster on a CPU"
    )
    parser.add_argument(
        "--tp", action="store_true", help="share the model among the processes that torchrun starts, one a device"
    )
    parser.add_argument("--ep", action="store_true", help="as --tp, each process with some of the experts whole")
    parser.add_argument("--output", type=Path, default=Path("vg.jpg"), help="picture with boxes; default: vg.jpg")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    return parser.parse_args(arguments)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuses what cannot work before anything is loaded.

    Raises:
        ValueError: If a number is out of range, a question is empty, the device is not there, or the output cannot be
            written.
    """
    sampling_options(arguments.max_new_tokens, arguments.temperature, arguments.top_p, arguments.repetition_penalty)
    check_chunk_size(arguments.chunk_size)
    for follow_up in arguments.follow_up:
        if not follow_up.strip():
            raise ValueError("--follow_up is empty: ask something, or leave it out")
        place_image_marks(follow_up, 0)
    if arguments.seed is not None and not 0 <= arguments.seed <= MAX_SEED:
        raise ValueError(f"--seed {arguments.seed} must be 0 to {MAX_SEED}")
    device = resolve_device(arguments.device)
    if arguments.quantize is not None:
        check_quantization(arguments.quantize, device.type)
        if arguments.tp or arguments.ep:
            raise ValueError(f"--quantize {arguments.quantize} does not go with --tp or --ep: leave one of them out")
    sharing_options(arguments.tp or arguments.ep)
    check_output(arguments.output, arguments.image or [])


def check_output(path: Path, images: list[str]) -> None:
    """Refuses an output that could not be written, or would replace a picture that is asked about.

    Raises:
        ValueError: If the folder is missing or not writable, the name has no picture format's ending or is a folder's,
            or it is one of the pictures.
    """
    if path.suffix.lower() not in OUTPUT_SUFFIXES:
        raise ValueError(f"--output {path}: take a name that ends in one of {', '.join(OUTPUT_SUFFIXES)}")
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder; take the name of a file in it")
    if (
        not path.parent.is_dir()
        or not os.access(path.parent, os.W_OK)
        or (path.exists() and not os.access(path, os.W_OK))
    ):
        raise ValueError(f"--output {path}: the folder {path.parent} does not exist, or it cannot be written there")
    if path.exists() and any(Path(image).is_file() and path.samefile(image) for image in images if len(image) < 255):
        raise ValueError(f"--output {path} would replace the picture that is asked about; take another name")


def build_conversation(prompt: str | None, images: list[str] | None) -> list[dict[str, Any]]:
    """Puts question and pictures into the form of the processor; the bundled example without both.

    Raises:
        ValueError: If the question is empty, marks and pictures are not as many, or a picture cannot be read.
        OSError: If a picture is not there.
    """
    if prompt is None and images is None:
        prompt, images = EXAMPLE_PROMPT, [str(EXAMPLE_IMAGE)]
    images = images or []
    prompt = DESCRIBE_PICTURE if prompt is None else prompt
    if not prompt.replace(IMAGE, "").strip():
        raise ValueError("--prompt is empty: ask something, or leave it out to get the picture described")
    prompt = place_image_marks(prompt, len(images))
    pictures = [load_image(image) for image in images]
    return [{"role": USER, "content": prompt, "images": pictures}, {"role": ASSISTANT, "content": ""}]


def save_boxes(boxes: Sequence[GroundedBox], picture: Image.Image | None, path: Path) -> Path | None:
    """Draws boxes on a picture; returns where it was saved, None without boxes or picture."""
    if not boxes or picture is None or not is_first_process():
        return None
    return save_drawing(draw_boxes(picture, boxes), path, quality=95)


@dataclass(frozen=True)
class Answer:
    """What the model has said to one question.

    Attributes:
        text: With the special tokens of grounding.
        grounding: What it says of places.
        stream: How it came.
        seconds: How long that took.
    """

    text: str
    grounding: GroundingResult
    stream: AnswerStream
    seconds: float

    def to_dict(self, picture: Image.Image | None) -> dict[str, Any]:
        """For `--json`; with the picture, boxes also in its pixels."""
        return {
            "answer": self.text,
            "boxes": [box.to_dict(picture.size if picture else None) for box in self.grounding.boxes],
            "problems": self.grounding.problems,
            "is_cut_off": self.stream.is_cut_off,
            "prompt_tokens": self.stream.num_prompt_tokens,
            "image_tokens": self.stream.num_image_tokens,
            "new_tokens": self.stream.num_new_tokens,
            "seconds": round(self.seconds, 3),
        }


def read_out(stream: AnswerStream, is_shown: bool) -> str:
    """The whole answer; shown as it comes if that is wanted."""
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if is_shown:
            print(piece, end="", flush=True)
    if is_shown:
        print(flush=True)
    return "".join(pieces)


def warn(message: str) -> None:
    """Says something beside the answer."""
    print(f"inference.py: warning: {message}", file=sys.stderr)


def warn_about_length(stream: AnswerStream, max_new_tokens: int) -> None:
    """Says that an answer has no end, and what to do."""
    if not stream.is_cut_off:
        return
    if stream.num_new_tokens >= max_new_tokens:
        way_out = "--max_new_tokens sets the limit"
    else:
        way_out = f"after {stream.num_prompt_tokens} of the prompt the model has no positions left; ask with less"
    warn(f"the answer is cut off after {stream.num_new_tokens} tokens; {way_out}")


def answer(arguments: argparse.Namespace) -> None:
    """Loads the model, answers, saves the picture."""
    check_arguments(arguments)
    if arguments.temperature > MAX_ADVISED_TEMPERATURE:
        warn(
            f"temperature {arguments.temperature:g} is above {MAX_ADVISED_TEMPERATURE}; the published models get vague"
        )
    conversation = build_conversation(arguments.prompt, arguments.image)
    picture = (conversation[0]["images"] or [None])[-1]
    use_chosen_num_threads()
    tokenizer, model, processor = load_model(
        arguments.model_path,
        arguments.dtype,
        device=arguments.device,
        adapter=arguments.adapter,
        quantize=arguments.quantize,
        **sharing_options(arguments.tp or arguments.ep, arguments.ep),
    )
    seed = common_seed(arguments.seed, model.device)
    if seed is not None:
        torch.manual_seed(seed)
    # Keeps what was read for the questions that follow.
    known: dict[str, Any] = {"memory": ChatSession(model, processor).memory} if arguments.follow_up else {}
    answers: list[Answer] = []
    for follow_up in (None, *arguments.follow_up):
        if follow_up is not None:
            conversation[-1]["content"] = answers[-1].text
            conversation += [{"role": USER, "content": follow_up}, {"role": ASSISTANT, "content": ""}]
        start = time.perf_counter()
        stream = deepseek_generate(
            conversation,
            model,
            processor,
            tokenizer,
            max_length=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            repetition_penalty=arguments.repetition_penalty,
            chunk_size=arguments.chunk_size,
            **known,
        )
        text = read_out(stream, is_shown=not arguments.json)
        answers.append(Answer(text, read_grounding(text), stream, time.perf_counter() - start))
        warn_about_length(stream, arguments.max_new_tokens)
    boxes = [box for given in answers for box in given.grounding.boxes]
    saved = save_boxes(boxes, picture, arguments.output)
    if arguments.json:
        documents = [given.to_dict(picture) for given in answers]
        document = documents[0] | {"output": str(saved) if saved else None, "model": arguments.model_path}
        print(json.dumps(document | ({"follow_ups": documents[1:]} if arguments.follow_up else {}), ensure_ascii=False))
        return
    for given in answers:
        for problem in given.grounding.problems:
            warn(problem)
    if saved:
        print(f"The picture with {len(boxes)} box{'es' if len(boxes) > 1 else ''} is saved as {saved}.")


def main(arguments: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    options = parse_arguments(arguments)
    try:
        with only_first_process_speaks():
            answer(options)
    except KeyboardInterrupt:
        print("\ninference.py: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the answer has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RuntimeError, *USER_ERRORS) as error:
        if not can_be_mended(error):
            raise
        if is_first_to_fail():
            print(f"inference.py: error: {describe_error(error, MORE_MEMORY)}", file=sys.stderr, flush=True)
        return 2
    return 0


def quiet_libraries() -> None:
    """Leaves standard error to what concerns the user, and lets standard output take any letter."""
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(main())
