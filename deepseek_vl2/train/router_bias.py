"""Balances experts without a loss: moves the bias of `noaux_tc` routers by the load they had (arXiv:2408.15664)."""

from typing import Any

import torch
from accelerate.utils import reduce
from torch import nn
from transformers import TrainerCallback

from deepseek_vl2.models.modeling_deepseek import DeepseekV2TopkRouter


class RouterBiasUpdate(TrainerCallback):
    """After every optimizer step raises the bias of experts with less than the mean load, and lowers the others'.

    Padding does not count. Activations that are computed twice count twice, for every expert alike.

    Args:
        model: the language model or one that holds it. Biases become float32: steps of 0.001 vanish in bfloat16.
        speed: step of the bias.
    """

    def __init__(self, model: nn.Module, speed: float) -> None:
        self.speed = speed
        self.routers = [
            module
            for module in model.modules()
            if isinstance(module, DeepseekV2TopkRouter) and hasattr(module, "e_score_correction_bias")
        ]
        self.loads = [torch.zeros(router.num_experts, dtype=torch.long) for router in self.routers]
        for index, router in enumerate(self.routers):
            router.e_score_correction_bias = router.e_score_correction_bias.float()
            router.register_forward_hook(self._counter(index))

    def _counter(self, index: int) -> Any:
        def count(router: DeepseekV2TopkRouter, arguments: Any, outputs: Any) -> None:
            if not router.training:
                return
            _, is_token = arguments
            chosen = outputs[2] if is_token is None else outputs[2][is_token]  # [N, k]
            load = torch.bincount(chosen.flatten(), minlength=router.num_experts)
            self.loads[index] = self.loads[index].to(load.device) + load

        return count

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the biases and forgets the loads."""
        for index, router in enumerate(self.routers):
            bias = router.e_score_correction_bias
            load = reduce(self.loads[index].to(bias.device).float())  # of all processes
            bias += self.speed * torch.sign(load.mean() - load)
            self.loads[index].zero_()
