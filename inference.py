"""Asks a DeepSeek-VL2 model about pictures, from the command line.

python inference.py                                        the bundled example, with the bundled model
python inference.py --image a.jpg --prompt "<|ref|>the red circle<|/ref|>."
python inference.py --model_path deepseek-ai/deepseek-vl2-tiny --image a.jpg b.jpg --prompt "What differs?"
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from deepseek_vl2.models.special_tokens import ASSISTANT, GROUNDING, IMAGE, REF_END, REF_START, USER
from deepseek_vl2.serve.grounding import GroundingResult, draw_boxes, read_grounding
from deepseek_vl2.serve.inference import deepseek_generate, load_model
from deepseek_vl2.utils.io import DTYPES, load_image

EXAMPLE_IMAGE = Path(__file__).parent / "images" / "visual_grounding_1.jpeg"
EXAMPLE_PROMPT = f"{REF_START}the red star{REF_END}."
PROMPT_FOR_PICTURES = f"{GROUNDING}Describe the picture."


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Ask a DeepSeek-VL2 model about pictures.")
    parser.add_argument(
        "--model_path", default="nano", help="'nano' (bundled), a checkpoint folder or a name on the hub; default: nano"
    )
    parser.add_argument("--image", nargs="+", action="extend", metavar="PICTURE", help="paths or addresses of pictures")
    parser.add_argument(
        "--prompt", help=f"the question; {IMAGE} marks the places of the pictures, which stand in front otherwise"
    )
    parser.add_argument(
        "--chunk_size", type=int, default=-1, help="tokens to prefill at once, for less memory; default -1: all"
    )
    parser.add_argument("--max_new_tokens", type=int, default=512, help="length of the answer; default: 512")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, at best up to 0.7; default: 0")
    parser.add_argument("--top_p", type=float, default=0.9, help="used with a temperature; default: 0.9")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1: fewer repetitions; default: 1")
    parser.add_argument("--seed", type=int, default=None, help="for repeatable sampling")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps; default: auto")
    parser.add_argument("--dtype", default="bfloat16", choices=["auto", *DTYPES], help="default: bfloat16")
    parser.add_argument("--output", type=Path, default=Path("vg.jpg"), help="picture with boxes; default: vg.jpg")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    return parser.parse_args(arguments)


def build_conversation(prompt: str | None, images: list[str] | None) -> list[dict[str, Any]]:
    """Puts question and pictures into the form of the processor; the bundled example without both."""
    if prompt is None and images is None:
        prompt, images = EXAMPLE_PROMPT, [str(EXAMPLE_IMAGE)]
    images = images or []
    prompt = prompt if prompt is not None else PROMPT_FOR_PICTURES
    if IMAGE not in prompt:
        prompt = f"{IMAGE}\n" * len(images) + prompt
    pictures = [load_image(image) for image in images]
    return [{"role": USER, "content": prompt, "images": pictures}, {"role": ASSISTANT, "content": ""}]


def check_output(path: Path) -> None:
    """Refuses an output that could not be written, before any work is done.

    Raises:
        ValueError: If the folder is missing or not writable, or the name has no picture format's ending.
    """
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--output {path}: {path.suffix or 'no ending'} is no picture format; use .jpg or .png")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--output {path}: the folder {path.parent} does not exist or cannot be written to")


def save_boxes(grounding: GroundingResult, conversation: list[dict[str, Any]], path: Path) -> Path | None:
    """Draws the boxes on the last picture; returns where it was saved, None without boxes."""
    pictures = conversation[0]["images"]
    if not grounding.boxes or not pictures:
        return None
    draw_boxes(pictures[-1], grounding.boxes).save(path)
    return path


def answer(arguments: argparse.Namespace) -> None:
    """Loads the model, answers, saves the picture."""
    check_output(arguments.output)
    conversation = build_conversation(arguments.prompt, arguments.image)
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    tokenizer, model, processor = load_model(arguments.model_path, arguments.dtype, device=arguments.device)
    start = time.perf_counter()
    pieces = []
    for piece in deepseek_generate(
        conversation,
        model,
        processor,
        tokenizer,
        max_length=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        repetition_penalty=arguments.repetition_penalty,
        chunk_size=arguments.chunk_size,
    ):
        pieces.append(piece)
        if not arguments.json:
            print(piece, end="", flush=True)
    text = "".join(pieces)
    grounding = read_grounding(text)
    saved = save_boxes(grounding, conversation, arguments.output)
    if arguments.json:
        pictures = conversation[0]["images"]
        size = pictures[-1].size if pictures else None
        document = {
            "answer": text,
            "boxes": [box.to_dict(size) for box in grounding.boxes],
            "problems": grounding.problems,
            "output": str(saved) if saved else None,
            "model": arguments.model_path,
            "seconds": round(time.perf_counter() - start, 3),
        }
        print(json.dumps(document, ensure_ascii=False))
        return
    print()
    for problem in grounding.problems:
        print(f"warning: {problem}", file=sys.stderr)
    if saved:
        print(f"The picture with {len(grounding.boxes)} box(es) is saved as {saved}.")


def main(arguments: list[str] | None = None) -> int:
    """Runs the script; returns its exit code: 0, or 2 after an error that the user can mend."""
    try:
        answer(parse_arguments(arguments))
    except (ValueError, OSError, ImportError) as error:
        print(f"inference.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
