"""Small models that the tests of this folder share, see `small_models`."""

import pytest
from small_models import VARIANTS, seeded, vl_config

from deepseek_vl2.models import DeepseekVLV2ForCausalLM


@pytest.fixture(scope="session", params=VARIANTS)
def vl_model(request: pytest.FixtureRequest) -> DeepseekVLV2ForCausalLM:
    """The small model of each kind. Shared: tests that change it copy it first."""
    return seeded(DeepseekVLV2ForCausalLM, vl_config(VARIANTS[request.param]))


@pytest.fixture(scope="session")
def mla_model() -> DeepseekVLV2ForCausalLM:
    """The small model with MLA, for what does not depend on the kind."""
    return seeded(DeepseekVLV2ForCausalLM, vl_config())
