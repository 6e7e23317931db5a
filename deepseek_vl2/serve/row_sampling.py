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


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen. The numbers are those of `deepseek_generate`.

    Attributes:
        temperature: 0 for the likeliest token each time.
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


class RowSampler:
    """Chooses the tokens of one answer as transformers' `generate` does for this answer alone.

    Args:
        sampling: The settings.
        prompt: Ids [T] of the prompt, whose repetition is punished too.
        device: Where the logits are.
    """

    def __init__(self, sampling: Sampling, prompt: torch.Tensor, device: torch.device) -> None:
        self.is_greedy = sampling.temperature == 0
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

    def choose(self, logits: torch.Tensor) -> int:
        """Chooses by logits [vocabulary] and remembers the choice."""
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
    if sampling.temperature != 0:
        if sampling.temperature != 1:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
    return processors


def choose_tokens(logits: torch.Tensor, samplers: Sequence[RowSampler]) -> list[int]:
    """Chooses a token for each row of logits [B, vocabulary]."""
    likeliest = logits.argmax(dim=-1).tolist()  # one exchange with the device for all greedy rows
    return [
        token if sampler.takes_likeliest else sampler.choose(row)
        for token, sampler, row in zip(likeliest, samplers, logits, strict=True)
    ]
