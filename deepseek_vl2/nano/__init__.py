"""nano: a checkpoint of the DeepSeek-VL2 architecture, small enough to ship, with the recipe it was trained by.

`path()` is the folder to load: `DeepseekVLV2ForCausalLM.from_pretrained(deepseek_vl2.nano.path())`.
`python -m deepseek_vl2.nano` trains it again; `python -m deepseek_vl2.nano.evaluate` measures it.
"""

from pathlib import Path


def path() -> str:
    """Folder of the bundled checkpoint: model, configuration, tokenizer, processor and card."""
    return str(Path(__file__).parent / "checkpoint")
