"""Starts nano from the weights of an earlier, smaller edition instead of from nothing."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from deepseek_vl2.models import DeepseekVLV2ForCausalLM

TOKEN_TABLES = ("language.model.embed_tokens.weight", "language.lm_head.weight")
# Layers that write into the stream from which all others read. Where they are 0 a new part changes nothing yet.
WRITING_LAYERS = ("o_proj.weight", "down_proj", "down_proj.weight", "fc2.weight", "projector.layers.2.weight")


@torch.no_grad()
def grow_from(model: DeepseekVLV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Takes an earlier edition's weights over into a model that is as large or larger, in place.

    Weights go by name. Where a matrix is wider now, and in layers that are new, the added part begins without effect,
    so the model first computes what the earlier one did. Rows of tokens go by the token's text; a text that was
    several tokens begins as their mean.

    Args:
        model: The untrained model.
        tokenizer: Its tokenizer.
        folder: Checkpoint of the earlier edition.

    Raises:
        ValueError: If the checkpoint has a part that the model has not, or a larger one.
    """
    earlier = DeepseekVLV2ForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    names_of_model = model.state_dict()
    unknown = sorted(earlier.keys() - names_of_model.keys())
    if unknown:
        raise ValueError(f"{folder} has the weight {unknown[0]!r}, which nano has not: it is no earlier edition.")
    for name, weight in names_of_model.items():
        if name in TOKEN_TABLES:
            continue
        before = earlier.get(name)
        if before is None or before.shape != weight.shape:
            if name.endswith(WRITING_LAYERS):
                weight.zero_()
            if before is None:
                continue
            if before.dim() != weight.dim() or any(
                old > new for old, new in zip(before.shape, weight.shape, strict=True)
            ):
                raise ValueError(
                    f"{name!r} is {tuple(before.shape)} in {folder} and {tuple(weight.shape)} in nano: "
                    "weights can only grow."
                )
        weight[tuple(slice(extent) for extent in before.shape)] = before
    _take_tokens_over(names_of_model, tokenizer, earlier, PreTrainedTokenizerFast.from_pretrained(folder))


def _take_tokens_over(
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerFast,
    earlier: dict[str, torch.Tensor],
    earlier_tokenizer: PreTrainedTokenizerFast,
) -> None:
    known = earlier_tokenizer.get_vocab()
    for token, number in tokenizer.get_vocab().items():
        if token in known:
            numbers = [known[token]]
        else:
            text = tokenizer.convert_tokens_to_string([token])
            numbers = earlier_tokenizer(text, add_special_tokens=False)["input_ids"]
        if numbers:
            for name in TOKEN_TABLES:
                weights[name][number] = earlier[name][numbers].mean(dim=0)
