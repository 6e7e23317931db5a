"""How the language model is divided among processes, by transformers' plans of tensor and expert parallelism.

Tensor parallelism gives each process some heads of every layer and a part of the width of every feed-forward layer;
expert parallelism gives it some experts whole. Vision tower, projector, norms and routers are whole in every process.
"""

import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor

_DENSE_PLAN = {
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
_SHARED_EXPERTS_PLAN = {
    "layers.*.mlp.shared_experts.gate_proj": "colwise",
    "layers.*.mlp.shared_experts.up_proj": "colwise",
    "layers.*.mlp.shared_experts.down_proj": "rowwise",
}
_EXPERTS_PLAN = {
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
    "layers.*.mlp.experts": "moe_tp_experts",
}
EXPERT_PARALLEL_PLAN = {
    "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "layers.*.mlp.experts.down_proj": "grouped_gemm",
    "layers.*.mlp.experts": "ep_dispatch_experts",
}


def tensor_parallel_plan(config: Any) -> dict[str, str]:
    """The plan for the layers that a language model of this configuration has, by their names in `DeepseekV2Model`."""
    plan = {"layers.*.self_attn.o_proj": "rowwise"}
    if config.use_mla:
        plan["layers.*.self_attn.kv_a_proj_with_mqa"] = "mla_kv_a_proj"
        divided = ["q_proj" if config.q_lora_rank is None else "q_b_proj", "kv_b_proj"]
    else:
        divided = ["q_proj", "k_proj", "v_proj"]
    plan |= {f"layers.*.self_attn.{name}": "colwise" for name in divided}
    is_moe = [config.is_moe_layer(layer_idx) for layer_idx in range(config.num_hidden_layers)]
    if not all(is_moe):
        plan |= _DENSE_PLAN
    if any(is_moe):
        plan |= _EXPERTS_PLAN
        if config.n_shared_experts:
            plan |= _SHARED_EXPERTS_PLAN
    return plan


class CheckedSharesMixin:
    """`PreTrainedModel` that says which sizes cannot be shared out before it loads anything."""

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """Divides a model without weights as transformers does.

        Raises:
            ValueError: See `check_shares`.
        """
        if mesh_manager is not None:
            check_shares(model.config.get_text_config(), distributed_config.tp_size, distributed_config.ep_size)
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)  # type: ignore[misc]


def check_shares(config: Any, tp_size: int, ep_size: int) -> None:
    """Refuses numbers of processes that heads or experts cannot be shared out among.

    Args:
        config: Of the language model.
        tp_size: Processes that share the layers' widths.
        ep_size: Processes that share the experts; 1 if these are divided by width as well.

    Raises:
        ValueError: If a number is left over. It says which numbers of processes fit all that is divided.
    """
    sizes = {"num_attention_heads": config.num_attention_heads}
    if not config.use_mla:
        sizes["num_key_value_heads"] = config.num_key_value_heads
    if config.n_routed_experts is not None and ep_size == 1:
        sizes["moe_intermediate_size (width of an expert)"] = config.moe_intermediate_size
    shares = [(name, size, tp_size) for name, size in sizes.items()]
    if config.n_routed_experts is not None:
        shares.append(("n_routed_experts", config.n_routed_experts, ep_size))
    for name, size, num_processes in shares:
        if size % num_processes:
            fitting = ", ".join(map(str, _fitting_counts(config, list(sizes.values()), ep_size)))
            raise ValueError(
                f"{name} is {size}, which {num_processes} processes cannot share evenly; numbers of processes "
                f"that fit all sizes of this model: {fitting}."
            )


def _fitting_counts(config: Any, sizes: list[int], ep_size: int) -> list[int]:
    """Numbers of processes that fit all that is divided: given sizes, and those that `check_shares` does not refuse."""
    sizes = list(sizes)
    is_moe = [config.is_moe_layer(layer_idx) for layer_idx in range(config.num_hidden_layers)]
    if not all(is_moe):
        sizes.append(config.intermediate_size)
    if any(is_moe) and config.n_shared_experts:
        sizes.append(config.n_shared_experts * config.moe_intermediate_size)
    if config.n_routed_experts is not None and ep_size > 1:
        sizes.append(config.n_routed_experts)
    common = math.gcd(*sizes)
    return [count for count in range(1, common + 1) if common % count == 0]


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that may be divided among processes."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
