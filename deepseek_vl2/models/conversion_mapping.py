"""How checkpoints, which hold experts one by one, become the model's fused experts, and back when saving."""

from transformers import Concatenate, MergeModulelist, WeightConverter
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from .configuration_deepseek import DeepseekV2Config


def register_conversion_mapping() -> None:
    """Tells transformers to fuse and unfuse experts of this package's models.

    It goes by the model type of the language model, wherever that stands in a larger model. transformers' own model of
    that type has the same layout and the same recipe, so it goes on as before.
    """
    register_checkpoint_conversion_mapping(
        DeepseekV2Config.model_type,
        [
            WeightConverter(
                source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
                target_patterns="mlp.experts.gate_up_proj",
                operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
            ),
            WeightConverter(
                source_patterns="mlp.experts.*.down_proj.weight",
                target_patterns="mlp.experts.down_proj",
                operations=[MergeModulelist(dim=0)],
            ),
        ],
        overwrite=True,
    )
