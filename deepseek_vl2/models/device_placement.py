"""Maps of a model's parts to several devices, with a part of the weights on the CPU or the disk if need be."""

from collections.abc import Iterable
from typing import Any

VIEW_EMBEDDINGS = ("image_newline", "view_seperator")
_TOKEN_EMBEDDINGS = "language.model.embed_tokens"


def place_view_embeddings(device_map: dict[str, Any], parts: Iterable[str]) -> None:
    """Puts the two embeddings that are parameters of the whole model beside the token embeddings, in place.

    Weights on the disk are read whenever their layer runs. The whole model is no layer that always runs, as pictures
    may be embedded by themselves; so these two vectors stay in memory even if the token embeddings do not. Accelerate
    may move them on to its main device, the first accelerator; image tokens follow them there.

    Args:
        device_map: Names of modules and parameters (`""` for the rest) and their devices.
        parts: Names of the modules and parameters that the model has directly.
    """
    device = _device_of(_TOKEN_EMBEDDINGS, device_map)
    if device is None or (set(device_map.values()) == {device} and device != "disk"):
        return
    if "" in device_map:
        rest = device_map.pop("")
        device_map.update({part: rest for part in parts if part not in device_map})
    for name in VIEW_EMBEDDINGS:
        device_map[name] = "cpu" if device == "disk" else device


def _device_of(name: str, device_map: dict[str, Any]) -> Any:
    """The device of a parameter's or module's name, by the longest name above it; None if it has none."""
    while name not in device_map and name:
        name = name.rpartition(".")[0]
    return device_map.get(name)
