"""Weights in oneDNN's blocked layout, which a CPU reads up to twice as fast as rows when it decodes.

`pack_weights` exchanges the linear layers and experts of a model that only answers. The packed weights take the place
of the plain ones, so memory stays what it was; `state_dict`, `to`, `copy.deepcopy` and pickling see plain weights.
"""

import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.mlp import Mlp
from torch import nn
from tqdm.auto import tqdm

from .few_row_products import StreamedLinear
from .mapped_files import MappedFiles
from .modeling_deepseek import DeepseekV2Experts
from .sorted_experts import SortedExperts

logger = logging.getLogger(__name__)

# Layers whose weight is read elsewhere, too: absorbed attention takes the up-projection of the latent apart.
UNPACKED_LAYERS = ("kv_b_proj",)
# A subclass from elsewhere does something of its own.
PLAIN_LINEARS = (nn.Linear, StreamedLinear)
# The operators of torch that packing rests on are not public; they are tried out before each use in a process, with
# each type of weights, and may be off by so much.
_SELF_TEST_SHAPE = (48, 80)
_SELF_TEST_TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


def _pack(weight: torch.Tensor) -> torch.Tensor:
    """Reorders a weight [N, K]; the result is opaque to everything but `_packed_linear` and `to_dense`."""
    # The layout for one row: decoding is what waits for memory, and more rows run as fast in it.
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)


def _packed_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> torch.Tensor:
    """Rows [..., K] -> [..., N], with "gelu_tanh" or no activation behind it."""
    name, _, algorithm = activation.partition("_")
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], algorithm)


@cache
def is_packing_supported(dtype: torch.dtype) -> bool:
    """Whether this CPU and this torch run packed weights of a type, and right; a failure is logged once."""
    if dtype not in _SELF_TEST_TOLERANCES:
        return False
    operators = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in operators):
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_SELF_TEST_SHAPE, generator=generator).to(dtype)
    rows = torch.randn(3, _SELF_TEST_SHAPE[1], generator=generator).to(dtype)
    expected = F.gelu(F.linear(rows.float(), weight.float()), approximate="tanh")
    try:
        found = _packed_linear(rows, _pack(weight), None, "gelu_tanh").float()
    except RuntimeError as error:
        logger.warning("%s weights are not packed, torch's operators for it fail here: %s", dtype, error)
        return False
    tolerance = _SELF_TEST_TOLERANCES[dtype]
    if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
        logger.warning("%s weights are not packed, torch's operators for it give wrong results here.", dtype)
        return False
    return True


def _is_packable(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and is_packing_supported(weight.dtype)


class _PackedModule(nn.Module):
    """Holds packed weights by name beside ordinary parameters.

    They are no parameters, whose storage torch would ask for; what saves, copies or moves the module gets plain ones.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.packed: dict[str, list[torch.Tensor]] = {}

    def _unpacked(self, name: str) -> torch.Tensor:
        """The plain weight of a name."""
        raise NotImplementedError

    def _unpack(self) -> None:
        for name in list(self.packed):
            weight = nn.Parameter(self._unpacked(name), requires_grad=False)
            del self.packed[name]
            self.register_parameter(name, weight)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "_PackedModule":
        if self.packed:
            dtype = next(iter(self.packed.values()))[0].dtype
            probe = fn(torch.empty(1, dtype=dtype))
            if probe.device.type != "cpu" or probe.dtype != dtype:
                self._unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.packed:
            destination[prefix + name] = self._unpacked(name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"packed": {name: self._unpacked(name) for name in self.packed}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.packed = {name: self._packed_parts(weight) for name, weight in state["packed"].items()}

    def _packed_parts(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """Packs a weight [N, K], or each of [E, N, K]."""
        return [_pack(part) for part in (weight if weight.dim() == 3 else weight[None])]


class PackedLinear(_PackedModule):
    """A linear layer with a packed weight, and the activation behind it.

    Args:
        linear: The layer; its weight is on the CPU and of a type that is supported.
        activation: "gelu_tanh", or "none".
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, activation: str = "none") -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.activation = activation
        self.packed["weight"] = self._packed_parts(linear.weight)
        self.register_parameter("bias", linear.bias)

    def _unpacked(self, name: str) -> torch.Tensor:
        return self.packed[name][0].to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [..., K] -> [..., N]."""
        if self.packed and not (torch.is_grad_enabled() and x.requires_grad):
            return _packed_linear(x, self.packed["weight"][0], self.bias, self.activation)
        weight = self._unpacked("weight") if self.packed else self.weight
        output = F.linear(x, weight, self.bias)
        return F.gelu(output, approximate="tanh") if self.activation == "gelu_tanh" else output


class PackedExperts(_PackedModule, SortedExperts):
    """`DeepseekV2Experts` with packed weights."""

    def __init__(self, experts: DeepseekV2Experts) -> None:
        super().__init__(experts)
        for name in ("gate_up_proj", "down_proj"):
            self.packed[name] = self._packed_parts(getattr(experts, name))

    def _unpacked(self, name: str) -> torch.Tensor:
        return torch.stack([part.to_dense() for part in self.packed[name]])

    def project(self, rows: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        """See `SortedExperts.project`."""
        if self.packed and not (torch.is_grad_enabled() and rows.requires_grad):
            return _packed_linear(rows, self.packed[name][expert])
        weight = self.packed[name][expert].to_dense() if self.packed else getattr(self, name)[expert]
        return F.linear(rows, weight)


def _packable_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yields (parent, name, layer) of all layers to exchange."""
    # A tied output layer stays as it is: the embeddings read the same weight by rows.
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weight: Any
    for parent in model.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, DeepseekV2Experts):
                weight = layer.gate_up_proj
            elif type(layer) in PLAIN_LINEARS and name not in UNPACKED_LAYERS and id(layer.weight) not in tied:
                weight = layer.weight
            else:
                continue
            if _is_packable(weight):
                yield parent, name, layer


def pack_weights(model: nn.Module) -> int:
    """Packs all weights on the CPU that linear layers and experts hold, in place and one after the other.

    A packed model answers; it does not train. Weights of types for which packing is not supported stay as they are.

    Args:
        model: The model, in `eval` mode.

    Returns:
        How many layers were exchanged.

    Raises:
        ValueError: If the model is in training mode.
    """
    if model.training:
        raise ValueError("A packed model does not train: call model.eval() first, or leave it unpacked.")
    layers = list(_packable_layers(model))
    files = MappedFiles()
    for parent, name, layer in tqdm(layers, desc="Packing", unit="layer", leave=False, disable=None):
        activation = "none"
        if isinstance(parent, Mlp) and name == "fc1" and _is_gelu_tanh(parent):
            activation, parent.act = "gelu_tanh", nn.Identity()
        packed = PackedExperts(layer) if isinstance(layer, DeepseekV2Experts) else PackedLinear(layer, activation)
        setattr(parent, name, packed.eval())
        # Else weights that are views of a file stay in memory beside the packed ones.
        files.release_pages(getattr(layer, weight) for weight in packed.packed)
    return len(layers)


def _is_gelu_tanh(mlp: Mlp) -> bool:
    probe = torch.linspace(-3, 3, 13)
    return torch.equal(mlp.act(probe), F.gelu(probe, approximate="tanh"))
