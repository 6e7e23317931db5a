"""Run by `test_tensor_parallel.py` under torchrun: recorded models, shared among processes, against one process."""

import json
import sys
from pathlib import Path

import torch
from transformers.distributed import DistributedConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from conftest import VARIANTS, Golden, load_golden

from deepseek_vl2.models import DeepseekVLV2ForCausalLM

MODES = {"tensor": {"tp_size": 2}, "expert": {"tp_size": 2, "ep_size": 2}}
NUM_TOKENS = 6  # each waits for both processes in every layer
GREEDY = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "pad_token_id": 1, "eos_token_id": 1, "bos_token_id": 0}


def compare(golden: Golden, mode: str, logits: torch.Tensor) -> dict:
    """What a shared model makes of all recorded prompts, beside the logits of one process."""
    model, info = DeepseekVLV2ForCausalLM.from_pretrained(
        golden.folder,
        dtype=torch.float32,
        distributed_config=DistributedConfig(**MODES[mode]),
        output_loading_info=True,
    )
    batch = golden.batch()
    is_token = batch["attention_mask"].bool()
    num_prompt = is_token.shape[1]
    with torch.no_grad():
        difference = (model(**batch).logits - logits)[is_token].abs().max().item()
        embeds, cache = model.incremental_prefilling(**batch, chunk_size=64)
    output = model.generate(inputs_embeds=embeds, **batch, past_key_values=cache, **GREEDY)
    layer = model.language.model.layers[1]
    return {
        "difference": difference,
        "tokens": output[:, num_prompt:].tolist(),
        "expected": [case.recorded["tokens"][:NUM_TOKENS] for case in golden.cases.values()],
        "complaints": sum(map(len, info.values())),
        "heads_width": layer.self_attn.o_proj.weight.to_local().shape[1],
        "all_heads_width": layer.self_attn.o_proj.weight.shape[1],
        "experts": list(layer.mlp.experts.gate_up_proj.to_local().shape),
        "all_experts": list(layer.mlp.experts.gate_up_proj.shape),
    }


def main() -> None:
    results = {}
    for variant in sys.argv[2:] or VARIANTS:
        golden = load_golden(variant)
        with torch.no_grad():
            logits = golden.model(**golden.batch()).logits
        for mode in MODES:
            results[f"{variant} {mode}"] = compare(golden, mode, logits)
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
