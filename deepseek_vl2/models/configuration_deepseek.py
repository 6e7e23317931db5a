"""Configuration of the DeepSeekMoE language model (arXiv:2405.04434)."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from .parallel import EXPERT_PARALLEL_PLAN, tensor_parallel_plan

TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
SCORING_FUNCTIONS = ("softmax", "sigmoid")


class DeepseekV2Config(PreTrainedConfig):
    """Configuration of `DeepseekV2ForCausalLM`.

    The defaults are those that the published checkpoints rely on for whatever their `config.json` leaves out. They
    differ from transformers' class of the same name, which is why this class is never registered with `AutoConfig`.

    Attributes:
        vocab_size: Number of token ids.
        hidden_size: Text width D.
        intermediate_size: Width of the dense feed-forward layers.
        moe_intermediate_size: Width of one expert.
        n_shared_experts: Experts that see every token, fused into one feed-forward layer; none if None.
        n_routed_experts: Experts that the router chooses from; every layer is dense if None.
        num_experts_per_tok: Experts chosen for each token.
        routed_scaling_factor: Factor on the weights of the chosen experts.
        topk_method: `greedy`, `group_limited_greedy` (best groups of experts first) or `noaux_tc` (groups by their two
            best experts, with a correction bias that balances load without an auxiliary loss; arXiv:2412.19437).
        n_group: Number of groups of experts for the two grouped methods.
        topk_group: Groups that a token may use.
        norm_topk_prob: Whether the weights of the chosen experts are normalised to sum 1 before scaling.
        scoring_func: `softmax` or `sigmoid`.
        aux_loss_alpha: Weight of the load-balancing loss in training; 0 switches it off.
        seq_aux: Whether that loss balances each sequence by itself rather than the whole batch.
        moe_layer_freq: Every so many layers is a mixture of experts.
        first_k_dense_replace: Layers before this one are dense.
        use_mla: Multi-head latent attention if True, multi-head attention with rotated halves if False.
        kv_lora_rank: Numbers of the compressed latent that MLA caches for a token.
        q_lora_rank: Rank of the query compression, or None for a full projection.
        qk_nope_head_dim: Query and key numbers a head without position.
        qk_rope_head_dim: Query and key numbers a head that are rotated by position.
        v_head_dim: Value numbers a head.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Scaling of the rotary frequencies, as in transformers (`{"type": "yarn", "factor": ...}`).

    Raises:
        ValueError: If a value is unknown or values contradict each other.
    """

    model_type = "deepseek_v2"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map: ClassVar[dict[str, str]] = {"num_experts": "n_routed_experts"}

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    ep_size: int = 1
    routed_scaling_factor: float = 1.0
    kv_lora_rank: int | None = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    qk_nope_head_dim: int = 128
    topk_method: str = "greedy"
    n_group: int | None = None
    topk_group: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    pretraining_tp: int = 1
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    use_mla: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.rope_scaling is not None:
            # transformers reads everything about positions from `rope_parameters` and completes it in place.
            self.rope_parameters = dict(self.rope_scaling)
        # transformers' class of the same name writes them into config.json; here they follow from other sizes.
        derived = {name: kwargs.pop(name) for name in ("head_dim", "qk_head_dim") if name in kwargs}
        super().__post_init__(**kwargs)
        self._check_values()
        for name, value in derived.items():
            if value != getattr(self, name):
                raise ValueError(f"{name} is {value}, but other sizes make it {getattr(self, name)}. Leave it out.")

    @property
    def qk_head_dim(self) -> int:
        """Query and key numbers a head of MLA."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def head_dim(self) -> int:
        """Numbers a head that are rotated by position: a part of the head in MLA, the whole head otherwise."""
        return self.qk_rope_head_dim if self.use_mla else self.hidden_size // self.num_attention_heads

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # type: ignore[override]  # transformers reads it of the instance
        """How tensor parallelism divides the layers that this configuration has."""
        return tensor_parallel_plan(self)

    @property
    def base_model_ep_plan(self) -> dict[str, str]:  # type: ignore[override]
        """How expert parallelism divides the experts, if there are any."""
        return dict(EXPERT_PARALLEL_PLAN) if self.n_routed_experts is not None else {}

    @property
    def is_grouped_routing(self) -> bool:
        return self.topk_method != "greedy"

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether a layer is a mixture of experts rather than dense."""
        return (
            self.n_routed_experts is not None
            and layer_idx >= self.first_k_dense_replace
            and layer_idx % self.moe_layer_freq == 0
        )

    def _check_values(self) -> None:
        if self.topk_method not in TOPK_METHODS:
            raise ValueError(f"topk_method {self.topk_method!r} is unknown. Choose one of {', '.join(TOPK_METHODS)}.")
        if self.scoring_func not in SCORING_FUNCTIONS:
            raise ValueError(
                f"scoring_func {self.scoring_func!r} is unknown. Choose one of {', '.join(SCORING_FUNCTIONS)}."
            )
        if not self.use_mla and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )
        if not self.use_mla and self.num_attention_heads % self.num_key_value_heads:  # type: ignore[operator]
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"{self.head_dim} numbers a head are rotated by position, which takes an even number.")
        if self.use_mla and not self.kv_lora_rank:
            raise ValueError(
                f"kv_lora_rank is {self.kv_lora_rank}, but multi-head latent attention needs one. "
                "Set use_mla to false for multi-head attention."
            )
        if self.n_routed_experts is not None:
            self._check_routing(self.n_routed_experts)

    def _check_routing(self, num_experts: int) -> None:
        if not self.num_experts_per_tok or not 1 <= self.num_experts_per_tok <= num_experts:
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok}, must be 1 to {num_experts}.")
        if self.is_grouped_routing:
            if not self.n_group or num_experts % self.n_group:
                raise ValueError(f"n_group is {self.n_group}, must divide n_routed_experts {num_experts}.")
            if not self.topk_group or not 1 <= self.topk_group <= self.n_group:
                raise ValueError(f"topk_group is {self.topk_group}, must be 1 to n_group {self.n_group}.")
            num_allowed = self.topk_group * num_experts // self.n_group
            if self.num_experts_per_tok > num_allowed:
                raise ValueError(
                    f"num_experts_per_tok is {self.num_experts_per_tok}, but topk_group {self.topk_group} of n_group "
                    f"{self.n_group} leave {num_allowed} experts to choose from."
                )
