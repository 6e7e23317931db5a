"""Choosing the next token of each row of a batch by the row's own settings and its own chance."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# Below, the likeliest token is as good as certain, and logits divided by the temperature leave the range of float32.
LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen. The numbers are those of `deepseek_generate`.

    Attributes:
        temperature: 0 (or below `LEAST_TEMPERATURE`) for the likeliest token each time.
        top_p: Share of the likeliest tokens that sampling draws from.
        top_k: Number of the likeliest tokens that sampling draws from, 0 for all.
        repetition_penalty: Above 1 for fewer repetitions.
        seed: The same seed gives the same answer; None for another each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 50
    repetition_penalty: float = 1.0
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature < LEAST_TEMPERATURE


class RowSampler:
    """Chooses the tokens of one answer as transformers' `generate` does for this answer alone.

    Args:
        sampling: The settings.
        prompt: Ids [T] of the prompt, whose repetition is punished too.
        device: Where the logits are.
    """

    def __init__(self, sampling: Sampling, prompt: torch.Tensor, device: torch.device) -> None:
        self.is_greedy = sampling.is_greedy
        self._processors = _processors(sampling)
        self._ids = prompt[None].to(device)
        self._generator: torch.Generator | None = None
        if not self.is_greedy:
            seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
            self._generator = torch.Generator(device).manual_seed(seed)

    @property
    def takes_likeliest(self) -> bool:
        """Whether the choice is that of the plain logits."""
        return self.is_greedy and not self._processors

    def choose(self, logits: torch.Tensor, likeliest: int) -> int:
        """Chooses by logits [vocabulary], of which one is known to be the largest, and remembers the choice."""
        if self.takes_likeliest:
            return likeliest
        scores = self._processors(self._ids, logits[None].float())  # type: ignore[arg-type]
        if self.is_greedy:
            token = scores.argmax(dim=-1, keepdim=True)
        else:
            token = torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator)
        if self._processors:
            self._ids = torch.cat((self._ids, token), dim=1)
        return int(token)


def _processors(sampling: Sampling) -> LogitsProcessorList:
    """What changes the logits, in the order of `generate`."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if not sampling.is_greedy:
        if sampling.temperature != 1:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
    return processors


def likeliest_tokens(logits: torch.Tensor) -> list[int]:
    """The token with the largest of logits [B, vocabulary] in each row; one exchange with the device for all."""
    likeliest: list[int] = logits.argmax(dim=-1).tolist()
    return likeliest


def choose_tokens(logits: torch.Tensor, samplers: Sequence[RowSampler]) -> list[int]:
    """Chooses a token for each row of logits [B, vocabulary]."""
    likeliest = likeliest_tokens(logits)
    return [sampler.choose(row, token) for sampler, row, token in zip(samplers, logits, likeliest, strict=True)]
