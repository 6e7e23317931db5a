"""Makes a tokenizer fit for DeepSeek-VL2, or refuses it."""

from collections.abc import Sequence
from typing import Any

# Chinese, two spaces in a row and a line break: what a Metaspace pre-tokenizer loses or changes.
PROBE = "你好 a  b\n12345"

_REMEDY = (
    "Load it with transformers.PreTrainedTokenizerFast.from_pretrained(folder), never with LlamaTokenizerFast, and "
    "take the original tokenizer.json if this one was saved after such a load."
)


def check_byte_level(tokenizer: Any) -> None:
    """Refuse a tokenizer whose byte-level rules were replaced.

    `LlamaTokenizerFast` of transformers 5 does that to every tokenizer.json without a word: Chinese text and spaces
    are lost, and saving it spreads the damage.

    Raises:
        ValueError: a Metaspace pre-tokenizer is in place, or a probe text does not survive encoding and decoding.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and "Metaspace" in repr(backend.pre_tokenizer):
        raise ValueError(f"{type(tokenizer).__name__} has a Metaspace pre-tokenizer in place of byte-level. {_REMEDY}")
    decoded = tokenizer.decode(tokenizer.encode(PROBE, add_special_tokens=False))
    if decoded != PROBE:
        raise ValueError(f"the tokenizer turns {PROBE!r} into {decoded!r}: it is not the model's own. {_REMEDY}")


def add_missing_tokens(tokenizer: Any, tokens: Sequence[str], pad_token: str | None) -> dict[str, int]:
    """Add the special tokens and the pad token that a tokenizer lacks. Ids of the known ones stay.

    Args:
        tokenizer: changed in place.
        tokens: special tokens, in the order in which the missing ones get their ids.
        pad_token: taken only if the tokenizer has no pad token.

    Returns:
        The id of every token in `tokens`.

    Raises:
        ValueError: no bos, eos or pad token, or a token is not encoded as one id of its own.
    """
    lacking = [name for name in ("bos_token", "eos_token") if getattr(tokenizer, name) is None]
    if tokenizer.pad_token is None:
        if pad_token:
            tokenizer.add_special_tokens({"pad_token": pad_token})
        else:
            lacking.append("pad_token")
    if lacking:
        raise ValueError(
            f"the tokenizer has no {' and no '.join(lacking)}: it is not one of DeepSeek-VL2, or its "
            "tokenizer_config.json is missing"
        )
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)}, replace_extra_special_tokens=False)
    ids = {token: tokenizer.encode(token, add_special_tokens=False) for token in tokens}
    broken = [token for token, encoded in ids.items() if len(encoded) != 1]
    if broken:
        raise ValueError(f"special tokens {broken} are not in the tokenizer and cannot be added to it")
    if len({encoded[0] for encoded in ids.values()}) != len(ids):
        raise ValueError(f"several special tokens share an id: {ids}")
    return {token: encoded[0] for token, encoded in ids.items()}
