"""Supervised fine-tuning: `python -m deepseek_vl2.train --config FILE`, or `train(TrainConfig(...))`.

config -> data -> collator; parts, lora -> router_bias, trainer; merge puts an adapter into the weights.
"""

from deepseek_vl2.train.config import TrainConfig, read_config
from deepseek_vl2.train.trainer import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "read_config", "train"]
