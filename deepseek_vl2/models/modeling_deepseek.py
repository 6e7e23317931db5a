"""The DeepSeekMoE language model (arXiv:2405.04434), with multi-head latent attention (MLA) or multi-head attention.

Shapes: B batch, T new tokens, K cached and new tokens, D text width, H heads, N tokens of all rows, E experts.
For MLA: R numbers of the cached latent, P rotated numbers a head, `nope` numbers a head without position.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from . import few_tokens
from .attention_kernels import attend_on_cpu, eager_attention_forward, mask_scores
from .balancing_loss import AddLossGradient, load_balancing_loss
from .configuration_deepseek import DeepseekV2Config
from .cpu_features import product_dtype
from .few_row_products import StreamedLinear, are_few_rows, project
from .few_tokens import FeedForward, HeadAttention, LatentAttention, Routing, are_few_tokens, is_silu
from .generation import PrefilledGenerationMixin, check_prompt_length
from .growing_cache import GrowingCache
from .parallel import CheckedSharesMixin, local_tensor
from .rotary_positions import DeepseekV2RotaryEmbedding, rotate_halves, rotate_interleaved, yarn_score_scaling
from .sorted_experts import StreamedExpertsInterface
from .streamed_weights import StreamedWeight, is_plain, remember, weights_of


class DeepseekV2RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 whatever the weights' type."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = hidden_states.float()
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)


class DeepseekV2MLP(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, config: DeepseekV2Config, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = StreamedLinear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = StreamedLinear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = StreamedLinear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def feed_forward(self) -> FeedForward | None:
        """The weights as `few_tokens` takes them; None if the layer does more than these say."""
        weights = weights_of(self.gate_proj, self.up_proj, self.down_proj)
        return None if weights is None or not is_silu(self.act_fn) else FeedForward(weights)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class DeepseekV2TopkRouter(nn.Module):
    """Chooses the experts of each token and their weights, in float32."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        self.config = config
        self.top_k: int = config.num_experts_per_tok  # type: ignore[assignment]
        self.num_experts: int = config.n_routed_experts  # type: ignore[assignment]
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            # Moved by the balance of the load and not by a gradient, hence a buffer.
            self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts))

    def forward(
        self, hidden_states: torch.Tensor, is_token: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Routes tokens.

        Args:
            hidden_states: [B, T, D].
            is_token: False [B, T] at padding, which the loss leaves out; None if there is none.

        Returns:
            Logits [B, T, E], weights [B, T, k] and indices [B, T, k] of the chosen experts, and the load-balancing loss
            (0 outside training and for `noaux_tc`, which balances by its bias).
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            rows = hidden_states.float()
            streamed = project(rows, remember(self, "weight", self.weight)) if are_few_rows(rows) else None
            logits = F.linear(rows, self.weight.float()) if streamed is None else streamed
        scores = logits.softmax(dim=-1) if self.config.scoring_func == "softmax" else logits.sigmoid()
        topk_indices = self._choose(scores)
        weights = scores.gather(-1, topk_indices)
        if self.config.norm_topk_prob and self.top_k > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        weights = weights * self.config.routed_scaling_factor
        return logits, weights, topk_indices, self._balancing_loss(scores, topk_indices, is_token)

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        if self.config.topk_method == "greedy":
            return scores.topk(self.top_k, dim=-1, sorted=False).indices
        grouped = scores.unflatten(-1, (self.config.n_group, -1))
        if self.config.topk_method == "group_limited_greedy":
            group_scores, forbidden = grouped.amax(dim=-1), 0.0
        else:
            scores = scores + self.e_score_correction_bias
            grouped = scores.unflatten(-1, (self.config.n_group, -1))
            group_scores, forbidden = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1), -math.inf
        best_groups = group_scores.topk(self.config.topk_group, dim=-1, sorted=False).indices
        is_allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(-1, best_groups, True)
        choice_scores = grouped.masked_fill(~is_allowed[..., None], forbidden).flatten(-2)
        return choice_scores.topk(self.top_k, dim=-1, sorted=False).indices

    def _balancing_loss(
        self, scores: torch.Tensor, topk_indices: torch.Tensor, is_token: torch.Tensor | None
    ) -> torch.Tensor:
        alpha = self.config.aux_loss_alpha
        if not self.training or not alpha or self.config.topk_method == "noaux_tc":
            return scores.new_zeros(())
        return alpha * load_balancing_loss(scores, topk_indices, self.config.seq_aux, is_token)


@use_experts_implementation(experts_interface=StreamedExpertsInterface())
class DeepseekV2Experts(nn.Module):
    """The routed experts, fused into two tensors; checkpoints hold them one by one (see `conversion_mapping`)."""

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        self.config = config
        self.num_experts: int = config.n_routed_experts  # type: ignore[assignment]
        width = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def streamed_weights(self) -> tuple[StreamedWeight, StreamedWeight] | None:
        """The weights as the kernels for few rows read them; None where that is not what the user chose."""
        if self.config._experts_implementation != "grouped_mm" or self._is_expert_parallel:
            return None
        gate_up, down = (remember(self, name, getattr(self, name)) for name in ("gate_up_proj", "down_proj"))
        return gate_up, down

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Plain loop over the experts that were chosen, `experts_implementation="eager"`.

        Args:
            hidden_states: [N, D].
            top_k_index: [N, k].
            top_k_weights: [N, k].
        """
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # it is with another process, see `parallel`
                continue
            token, slot = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output.index_add_(0, token, (expert_output * top_k_weights[token, slot, None]).to(output.dtype))
        return output


class DeepseekV2MoE(nn.Module):
    """Mixture of experts: the chosen routed experts plus the shared ones that see every token."""

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__()
        self.gate = DeepseekV2TopkRouter(config)
        self.experts = DeepseekV2Experts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = DeepseekV2MLP(config, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, hidden_states: torch.Tensor, is_token: torch.Tensor | None = None) -> torch.Tensor:
        _, topk_weights, topk_indices, balancing_loss = self.gate(hidden_states, is_token)
        output = self.experts(hidden_states.flatten(0, 1), topk_indices.flatten(0, 1), topk_weights.flatten(0, 1))
        output = output.view_as(hidden_states)
        if self.training and balancing_loss.requires_grad:
            output = AddLossGradient.apply(output, balancing_loss)
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden_states)
        return output

    def feed_forward(self) -> FeedForward | None:
        """The weights as `few_tokens` takes them; None if some part does more than these say."""
        experts: tuple[StreamedWeight, StreamedWeight] | None = None
        if hasattr(type(self.experts), "streamed_weights") and is_plain(self.experts) and is_silu(self.experts.act_fn):
            experts = self.experts.streamed_weights()
        if experts is None or type(self.gate) is not DeepseekV2TopkRouter or not is_plain(self.gate):
            return None
        shared: FeedForward | None = FeedForward(())
        if self.shared_experts is not None:
            is_known = isinstance(self.shared_experts, DeepseekV2MLP) and is_plain(self.shared_experts)
            shared = self.shared_experts.feed_forward() if is_known else None
        if shared is None:
            return None
        router = remember(self.gate, "weight", self.gate.weight)
        bias = getattr(self.gate, "e_score_correction_bias", None)
        return FeedForward(shared.shared, experts, router, Routing.of(self.gate.config), bias)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs the attention kernel that the layer's configuration names; see `eager_attention_forward`."""
    if module.config._attn_implementation == "sdpa" and not module.training:
        output = attend_on_cpu(query, key, value, attention_mask, module.scaling)
        if output is not None:
            return output, None
    # The other kernels ask for values as wide as keys.
    value_width = value.shape[-1]
    if value_width < key.shape[-1]:
        value = F.pad(value, (0, key.shape[-1] - value_width))
    kernel: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
        module.config._attn_implementation, eager_attention_forward
    )
    dropout = module.config.attention_dropout if module.training else 0.0
    output, weights = kernel(
        module, query, key, value, attention_mask, scaling=module.scaling, dropout=dropout, **kwargs
    )
    return output[..., :value_width], weights


class DeepseekV2MultiHeadAttention(nn.Module):
    """Multi-head attention with rotated halves (tiny)."""

    def __init__(self, config: DeepseekV2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.head_dim
        num_key_heads: int = config.num_key_value_heads  # type: ignore[assignment]
        self.num_key_value_groups = config.num_attention_heads // num_key_heads
        self.scaling = self.head_dim**-0.5
        query_width = config.num_attention_heads * self.head_dim
        key_width = num_key_heads * self.head_dim
        self.q_proj = StreamedLinear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = StreamedLinear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = StreamedLinear(config.hidden_size, key_width, bias=config.attention_bias)
        self.o_proj = StreamedLinear(query_width, config.hidden_size, bias=config.attention_bias)

    def streamed_weights(self) -> HeadAttention | None:
        """The weights as `few_tokens` takes them; None if some layer does more than these say."""
        if self.config._attn_implementation != "sdpa":
            return None
        weights = weights_of(self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        return None if weights is None else HeadAttention(*weights)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H, T, head]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = rotate_halves(query, *position_embeddings)
        key = rotate_halves(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.flatten(2)), weights


class DeepseekV2Attention(nn.Module):
    """Multi-head latent attention (small, base; arXiv:2405.04434, 2.1).

    The cache holds one latent [B, 1, K, R] and one rotated key [B, 1, K, P] for all heads. Many new tokens at once
    expand it to keys and values of every head; a few new tokens leave it as it is and move the up-projection to the
    query and the output instead ("absorbed"), so a decoding step never expands the cache.

    With tensor parallelism H is the number of heads of this process, and the cache is the same in all of them.
    """

    def __init__(self, config: DeepseekV2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.num_key_value_groups = 1
        self.kv_lora_rank: int = config.kv_lora_rank  # type: ignore[assignment]
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_head_dim = config.qk_head_dim
        self.v_head_dim = config.v_head_dim
        query_width = config.num_attention_heads * self.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = StreamedLinear(config.hidden_size, query_width, bias=False)
        else:
            self.q_a_proj = StreamedLinear(config.hidden_size, config.q_lora_rank, bias=config.attention_bias)
            self.q_a_layernorm = DeepseekV2RMSNorm(config.q_lora_rank)
            self.q_b_proj = StreamedLinear(config.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = StreamedLinear(
            config.hidden_size, self.kv_lora_rank + self.qk_rope_head_dim, bias=config.attention_bias
        )
        # Its eps is 1e-6 whatever rms_norm_eps says.
        self.kv_a_layernorm = DeepseekV2RMSNorm(self.kv_lora_rank)
        expanded_width = config.num_attention_heads * (self.qk_nope_head_dim + self.v_head_dim)
        self.kv_b_proj = StreamedLinear(self.kv_lora_rank, expanded_width, bias=False)
        value_width = config.num_attention_heads * self.v_head_dim
        self.o_proj = StreamedLinear(value_width, config.hidden_size, bias=config.attention_bias)
        self.scaling = self.qk_head_dim**-0.5 * yarn_score_scaling(config.rope_parameters)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query = self._project_query(hidden_states).unflatten(-1, (-1, self.qk_head_dim)).transpose(1, 2)
        query_nope, query_rope = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        compressed = self.kv_a_proj_with_mqa(hidden_states)[:, None]
        latent, key_rope = compressed.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_layernorm(latent)  # [B, 1, T, R]
        query_rope = rotate_interleaved(query_rope, *position_embeddings)
        key_rope = rotate_interleaved(key_rope, *position_embeddings)  # [B, 1, T, P]
        num_new = query.shape[2]
        # The length of a preallocated cache says nothing of what it holds; one new token alone needs not ask.
        is_first = past_key_values is None or (num_new > 1 and past_key_values.get_seq_length(self.layer_idx) == 0)
        if past_key_values is not None:
            key_rope, latent = past_key_values.update(key_rope, latent, self.layer_idx)

        weights: torch.Tensor | None
        if not is_first and self._is_up_projection_readable() and self._is_absorbing_cheaper(num_new):
            output, weights = self._attend_absorbed(query_nope, query_rope, latent, key_rope, attention_mask)
        else:
            query = torch.cat((query_nope, query_rope), dim=-1)
            output, weights = self._attend_expanded(query, latent, key_rope, attention_mask, **kwargs)
        return self.o_proj(output.flatten(2)), weights

    def streamed_weights(self) -> LatentAttention | None:
        """The weights as `few_tokens` takes them; None if some layer does more than these say."""
        layers = [self.kv_a_proj_with_mqa, self.kv_b_proj, self.o_proj]
        norms = [self.kv_a_layernorm]
        if self.config.q_lora_rank is None:
            weights = weights_of(self.q_proj, *layers)
        else:
            weights = weights_of(self.q_a_proj, *layers, self.q_b_proj)
            norms.append(self.q_a_layernorm)
        if weights is None or not all(map(is_plain, norms)):
            return None
        query, compressed, up, output, *query_up = weights
        latent_norm, *query_norm = (remember(norm, "weight", norm.weight) for norm in norms)
        return LatentAttention(query, compressed, latent_norm, up, output, *query_norm, *query_up)

    def _project_query(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.config.q_lora_rank is None:
            return self.q_proj(hidden_states)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))

    def _is_up_projection_readable(self) -> bool:
        """Whether the layer `kv_b_proj` does no more than its weight says, which can be used in parts then.

        An offloaded weight is only there while the layer itself is called; what an adapter adds acts only then, too.
        """
        return not self.kv_b_proj.weight.is_meta and not hasattr(self.kv_b_proj, "base_layer")

    def _is_absorbing_cheaper(self, num_new: int) -> bool:
        """Compares multiplications for each cached token: longer dot products of T queries against one expansion."""
        if self.training:
            return False
        expanded_width = self.qk_nope_head_dim + self.v_head_dim
        return num_new * (2 * self.kv_lora_rank - expanded_width) < self.kv_lora_rank * expanded_width

    def _attend_expanded(
        self,
        query: torch.Tensor,
        latent: torch.Tensor,
        key_rope: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        num_heads, num_new = query.shape[1:3]
        # As many heads at once as make no more keys than a first chunk of this length has.
        num_at_once = max(1, num_heads * num_new // latent.shape[2])
        if num_at_once == num_heads or self.training or not self._is_up_projection_readable():
            return self._attend_heads(query, self.kv_b_proj(latent[:, 0]), key_rope, attention_mask, **kwargs)
        weight = local_tensor(self.kv_b_proj.weight)
        head_width = weight.shape[0] // num_heads
        parts = [
            self._attend_heads(some, F.linear(latent[:, 0], up), key_rope, attention_mask, **kwargs)
            for some, up in zip(query.split(num_at_once, 1), weight.split(num_at_once * head_width), strict=True)
        ]
        outputs, weights = zip(*parts, strict=True)
        return torch.cat(outputs, dim=2), None if weights[0] is None else torch.cat(weights, dim=1)

    def _attend_heads(
        self,
        query: torch.Tensor,
        expanded: torch.Tensor,
        key_rope: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of some heads [B, h, T, ...] to their expanded keys and values [B, K, h * (nope + Dv)]."""
        expanded = expanded.unflatten(-1, (query.shape[1], -1)).transpose(1, 2)
        key_nope, value = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)  # [B, h, K, ...]
        key = torch.cat((key_nope, key_rope.expand(-1, key_nope.shape[1], -1, -1)), dim=-1)
        return attend(self, query, key, value, attention_mask, **kwargs)

    def _attend_absorbed(
        self,
        query_nope: torch.Tensor,
        query_rope: torch.Tensor,
        latent: torch.Tensor,
        key_rope: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch_size, num_heads, num_new = query_nope.shape[:3]
        dtype = product_dtype(latent)
        known, known_rope = latent[:, 0].to(dtype), key_rope[:, 0].to(dtype)  # [B, K, R], [B, K, P]
        up_key, up_value = (
            local_tensor(self.kv_b_proj.weight)
            .to(dtype)
            .unflatten(0, (num_heads, -1))
            .split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        )
        # All rows of a batch are rows of one product for each head, which reads the head's weights once.
        query_latent = query_nope.to(dtype).transpose(0, 1).flatten(1, 2) @ up_key  # [H, B*T, R]
        query_latent = query_latent.unflatten(1, (batch_size, num_new)).transpose(0, 1)  # [B, H, T, R]
        # Heads lie beside tokens, so one product reads the cache once for all of them; CPUs are faster this way round.
        scores = known @ query_latent.flatten(1, 2).transpose(1, 2)  # [B, K, H*T]
        scores = scores + known_rope @ query_rope.to(dtype).flatten(1, 2).transpose(1, 2)
        scores = scores.transpose(1, 2).float().contiguous().unflatten(1, (num_heads, num_new)) * self.scaling
        scores = mask_scores(scores, attention_mask)
        weights = scores.softmax(dim=-1).to(dtype)
        mixed = (weights.flatten(1, 2) @ known).unflatten(1, (num_heads, num_new))
        output = mixed.transpose(0, 1).flatten(1, 2) @ up_value.transpose(1, 2)  # [H, B*T, Dv]
        output = output.to(latent.dtype).unflatten(1, (batch_size, num_new)).permute(1, 2, 0, 3)
        return output, weights.to(latent.dtype)


class DeepseekV2DecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward layer, each behind a norm and with a residual path."""

    def __init__(self, config: DeepseekV2Config, layer_idx: int) -> None:
        super().__init__()
        attention_class = DeepseekV2Attention if config.use_mla else DeepseekV2MultiHeadAttention
        self.self_attn = attention_class(config, layer_idx)
        self.is_moe = config.is_moe_layer(layer_idx)
        self.mlp = DeepseekV2MoE(config) if self.is_moe else DeepseekV2MLP(config, config.intermediate_size)
        self.input_layernorm = DeepseekV2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, is_token: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """Hidden states [B, T, D] -> [B, T, D]; `is_token` as in the router, other keywords as in the attention."""
        if are_few_tokens(hidden_states) and not self.training:
            return self._run_few_tokens(hidden_states, is_token, **kwargs)
        return self._feed_forward(self._attend(hidden_states, **kwargs), is_token)

    def _run_few_tokens(
        self, hidden_states: torch.Tensor, is_token: torch.Tensor | None, **kwargs: Any
    ) -> torch.Tensor:
        """The same by compiled kernels, but for what these do not do."""
        attended = None
        cache = kwargs.get("past_key_values")
        if isinstance(cache, GrowingCache):
            layer = cache.layers[self.self_attn.layer_idx]
            tables, mask = kwargs["position_embeddings"], kwargs.get("attention_mask")
            attended = few_tokens.attend(self.input_layernorm, self.self_attn, hidden_states, layer, tables, mask)
        hidden_states = self._attend(hidden_states, **kwargs) if attended is None else attended
        output = few_tokens.feed_forward(self.post_attention_layernorm, self.mlp, hidden_states)
        return self._feed_forward(hidden_states, is_token) if output is None else output

    def _attend(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]

    def _feed_forward(self, hidden_states: torch.Tensor, is_token: torch.Tensor | None) -> torch.Tensor:
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed, is_token) if self.is_moe else self.mlp(normed))


class DeepseekV2PreTrainedModel(CheckedSharesMixin, PreTrainedModel):
    """What transformers has to know about these models to load, place and run them."""

    config_class = DeepseekV2Config
    config: DeepseekV2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DeepseekV2DecoderLayer",)  # type: ignore[assignment]
    _skip_keys_device_placement = ("past_key_values",)  # type: ignore[assignment]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012 - transformers replaces it on the class
        "hidden_states": DeepseekV2DecoderLayer,
        "attentions": [
            OutputRecorder(DeepseekV2Attention, index=1),
            OutputRecorder(DeepseekV2MultiHeadAttention, index=1),
        ],
        "router_logits": OutputRecorder(DeepseekV2TopkRouter, index=0),
    }

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Checks an attention kernel as transformers does, and names the way out if it cannot run here.

        Raises:
            ValueError: If the kernel is unknown.
            ImportError: If it needs a package or device that is not there.
        """
        try:
            return super().get_correct_attn_implementation(requested_attention, is_init_check)
        except ImportError as error:
            raise ImportError(f"Attention {requested_attention!r} cannot run here, use 'sdpa': {error}") from error

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.get_text_config().initializer_range
        if isinstance(module, DeepseekV2TopkRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if hasattr(module, "e_score_correction_bias"):
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, DeepseekV2Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)


def positions_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions [B, K] counted over real tokens only, so that a padded row gets the positions it has alone."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


class DeepseekV2Model(DeepseekV2PreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            DeepseekV2DecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = DeepseekV2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepseekV2RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Runs the decoder over new tokens.

        Args:
            input_ids: [B, T], or None with `inputs_embeds`.
            attention_mask: [B, K], 1 for real tokens and 0 for padding; all real if None.
            position_ids: [B, T]; counted over the real tokens of `attention_mask` if None.
            past_key_values: Cache of the K - T tokens before.
            inputs_embeds: [B, T, D].
            use_cache: Whether to return a cache.

        Returns:
            Hidden states [B, T, D] after the last norm, and the cache.

        Raises:
            ValueError: If both or neither of ids and embeddings are given, or there are more tokens than positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds, not both and not neither.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = GrowingCache(self.config.num_hidden_layers)
        num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        num_new = inputs_embeds.shape[1]
        if num_new > 1:
            check_prompt_length(num_past + num_new, self.config)
        if position_ids is None:
            if attention_mask is not None and attention_mask.dim() == 2:
                position_ids = positions_from_mask(attention_mask)[:, -num_new:]
            else:
                position_ids = torch.arange(num_past, num_past + num_new, device=inputs_embeds.device)[None]
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        is_token = None
        if self.training and attention_mask is not None and attention_mask.dim() == 2:
            is_token = attention_mask[:, -num_new:].bool()
        position_embeddings = self.rotary_emb(position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                is_token=is_token,  # as an argument, so that recomputed activations get the same
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class DeepseekV2ForCausalLM(  # type: ignore[misc]
    PrefilledGenerationMixin, DeepseekV2PreTrainedModel, GenerationMixin
):
    """The language model: decoder and output layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - read as a class attribute
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: DeepseekV2Config) -> None:
        super().__init__(config)
        self.model = DeepseekV2Model(config)
        self.lm_head = StreamedLinear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Predicts the next token at every position, see `DeepseekV2Model.forward`.

        Args:
            labels: Ids [B, T] to predict, -100 where there is nothing to learn; position t is predicted from t - 1.
            logits_to_keep: How many of the last positions to compute logits for; all if 0. The loss is of these, too.

        Returns:
            Loss if labels are given, logits [B, T, vocabulary] and the cache.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            if not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
                # What each position predicts, and of these the ones that have logits.
                shifted = F.pad(labels, (0, 1), value=-100)[:, 1:, None]
                kwargs["shift_labels"] = slice_logits_to_keep(shifted, logits_to_keep).squeeze(-1).contiguous()
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )
