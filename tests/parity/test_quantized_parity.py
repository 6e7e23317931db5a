"""Quantised models against the recorded logits of the reference implementation."""

import pytest
import torch

from deepseek_vl2.models import DeepseekVLV2ForCausalLM, WeightOnlyConfig


@pytest.mark.parametrize(("bits", "least"), [(8, 0.999), (4, 0.99)])
def test_logits_are_near(golden, bits, least):
    config = WeightOnlyConfig(bits, group_size=32)
    model = DeepseekVLV2ForCausalLM.from_pretrained(golden.folder, dtype=torch.float32, quantization_config=config)
    for name, case in golden.cases.items():
        with torch.no_grad():
            logits = model(**case.inputs).logits[0, case.recorded["positions"]]
        assert torch.cosine_similarity(logits.flatten(), case.logits.flatten(), dim=0) > least, name
