"""Joins encoded conversations to a batch for training."""

from collections.abc import Sequence

import torch

from deepseek_vl2.models import DeepseekVLV2Processor
from deepseek_vl2.models.processing_deepseek_vl_v2 import VLChatProcessorOutput


class TrainingCollator:
    """Pads on the right, as training needs it: on the left the end of an answer is lost where pad and eos are one.

    Args:
        processor: made the samples; its `batchify` joins them.
    """

    def __init__(self, processor: DeepseekVLV2Processor) -> None:
        self.processor = processor

    def __call__(self, samples: Sequence[VLChatProcessorOutput]) -> dict[str, torch.Tensor]:
        """Returns what the model takes, with `labels` [B, T]; shapes as in `BatchCollateOutput`."""
        batch = self.processor.batchify(samples, padding="right")
        inputs = {name: batch[name] for name in self.processor.model_input_names}
        labels = batch.labels.clone()
        labels[:, 0] = self.processor.ignore_id  # the beginning of the sentence, which nothing stands in front of
        return inputs | {"labels": labels}
