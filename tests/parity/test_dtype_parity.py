"""A model loaded in float32 and cast equals one loaded in that type, bit for bit.

The reference fails this: its rotary tables are rounded by the cast, which its README asks for.
"""

import pytest
import torch

from deepseek_vl2.models import DeepseekVLV2ForCausalLM

CASTS = {
    "to_bfloat16": (torch.bfloat16, lambda model: model.to(torch.bfloat16)),
    "bfloat16": (torch.bfloat16, lambda model: model.bfloat16()),
    "twice": (torch.bfloat16, lambda model: model.to(torch.bfloat16).to(torch.bfloat16)),
    "half": (torch.float16, lambda model: model.half()),
}


@pytest.mark.parametrize("name", CASTS)
@torch.no_grad()
def test_cast_equals_loading_in_that_type(golden, name):
    dtype, cast = CASTS[name]
    inputs = golden.cases["one_2x1"].inputs
    loaded = DeepseekVLV2ForCausalLM.from_pretrained(golden.folder, dtype=dtype).eval()
    casted = cast(DeepseekVLV2ForCausalLM.from_pretrained(golden.folder, dtype=torch.float32).eval())
    assert {p.dtype for p in [*loaded.parameters(), *loaded.buffers()]} == {dtype}
    logits = loaded(**inputs).logits
    assert logits.isfinite().all()
    assert torch.equal(casted(**inputs).logits, logits)


@torch.no_grad()
def test_half_precision_is_near_the_recording(golden):
    model = DeepseekVLV2ForCausalLM.from_pretrained(golden.folder, dtype=torch.bfloat16).eval()
    for case in golden.cases.values():
        logits = model(**case.inputs).logits[0, case.recorded["positions"]].float()
        # Not the largest difference: a router's near tie may fall the other way.
        assert (logits - case.logits).abs().median() < 0.02 * case.logits.abs().max()
