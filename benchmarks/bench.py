"""What the measurements work with: the loaded model, its prompt with a picture, and the machine's limits."""

import copy
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.limits import Limits
from benchmarks.timing import synchronize
from deepseek_vl2.models import DeepseekVLV2Config
from deepseek_vl2.utils.io import LoadedModel

CHUNK_SIZE = 512
# Five views and 1,036 tokens of tiny and base.
PICTURE_SIZE = (640, 480)
QUESTION = "<image>\nWhat is in this picture?"


@dataclass
class Bench:
    """A model on its bench.

    Attributes:
        loaded: Model, processor and tokenizer.
        weights: How weights are stored, one of `model_size.WEIGHT_KINDS`.
        limits: Probes of the machine.
        repeats: How often each work is timed.
        num_new_tokens: Tokens to decode each time.
    """

    loaded: LoadedModel
    weights: str
    limits: Limits
    repeats: int
    num_new_tokens: int

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def config(self) -> DeepseekVLV2Config:
        return self.loaded.model.config

    @property
    def device(self) -> torch.device:
        return self.loaded.model.device

    @property
    def chunk_size(self) -> int:
        """Tokens that are prefilled at once where memory is measured; no more than the context."""
        return min(CHUNK_SIZE, self.config.language_config.max_position_embeddings)

    def picture(self) -> Image.Image:
        """A picture of noise."""
        pixels = np.random.default_rng(0).integers(0, 256, (PICTURE_SIZE[1], PICTURE_SIZE[0], 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def prepare(self) -> Any:
        """Lets the processor prepare a question about a picture; on the model's device."""
        picture = self.picture()
        conversation: list[dict[str, Any]] = [
            {"role": "<|User|>", "content": QUESTION, "images": [picture]},
            {"role": "<|Assistant|>", "content": ""},
        ]
        inputs: Any = self.loaded.processor(conversations=conversation, images=[picture])
        return inputs.to(self.device, dtype=self.model.dtype)

    def random_embeds(self, num_tokens: int) -> torch.Tensor:
        """Embeddings [1, T, D] of a prompt of random tokens."""
        return self.model.get_input_embeddings()(self.random_ids(1, num_tokens))

    def random_ids(self, batch_size: int, num_tokens: int) -> torch.Tensor:
        """Random ids [B, T], no two rows alike."""
        generator = torch.Generator().manual_seed(batch_size * 10_000 + num_tokens)
        highest = self.config.language_config.vocab_size
        return torch.randint(0, highest, (batch_size, num_tokens), generator=generator).to(self.device)

    @property
    def max_tokens(self) -> int:
        """Positions that the model has."""
        return self.config.language_config.max_position_embeddings

    def generate(self, num_new_tokens: int, **inputs: Any) -> "TokenTimes":
        """Decodes greedily so many tokens and notes when each came; a given cache is copied first.

        Raises:
            ValueError: The prompt leaves no room for so many tokens.
        """
        num_prompt = inputs.get("input_ids", inputs.get("inputs_embeds")).shape[1]  # type: ignore[union-attr]
        if num_prompt + num_new_tokens > self.max_tokens:
            raise ValueError(
                f"{num_new_tokens} new tokens after {num_prompt} exceed the model's {self.max_tokens}: "
                "give fewer --new_tokens"
            )
        if inputs.get("past_key_values") is not None:
            inputs["past_key_values"] = copy.deepcopy(inputs["past_key_values"])
        clock = _TokenClock(self.device)
        synchronize(self.device)
        start = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                **inputs,
                max_new_tokens=num_new_tokens,
                min_new_tokens=num_new_tokens,
                do_sample=False,
                pad_token_id=self.loaded.processor.pad_id,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        return TokenTimes(start, clock.times)


@dataclass
class TokenTimes:
    """When tokens of an answer came.

    Attributes:
        start: When generation was called.
        times: When each token was chosen.
    """

    start: float
    times: list[float]

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.start

    @property
    def step(self) -> float:
        """Mean seconds from one token to the next."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


class _TokenClock(StoppingCriteria):
    """Notes the time of each token; it never stops."""

    def __init__(self, device: torch.device) -> None:
        self.times: list[float] = []
        self._device = device

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        synchronize(self._device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
