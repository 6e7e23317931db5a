"""Settings of a fine-tuning run: `TrainConfig`, read from a YAML or JSON file and the command line."""

import contextlib
import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

FROZEN, LORA, FULL = "frozen", "lora", "full"
ATTENTION, MLP, EXPERTS, ALL = "attention", "mlp", "experts", "all"
FLOAT32, BF16_AUTOCAST, BF16_WEIGHTS = "float32", "bf16_autocast", "bf16_weights"
# The speed of arXiv:2408.15664, which arXiv:2412.19437 trains with as well.
PUBLISHED_BIAS_SPEED = 0.001


def _rules(
    explanation: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> dict[str, Any]:
    """What a key means and may be (`low`, `high` included; `above`, `below` not)."""
    bounds = {"low": low, "high": high, "above": above, "below": below}
    return {"explanation": explanation, "choices": tuple(choices), **bounds}


def _option(default: Any, explanation: str, **rules: Any) -> Any:
    return dataclasses.field(default=default, metadata=_rules(explanation, **rules))


@dataclass
class TrainConfig:
    """What to train, on what, and how. Paths are relative to the working directory.

    `explain_keys()` prints every key with its explanation.

    Raises:
        ValueError: a value of the wrong type or out of range, or values that do not go together.
    """

    train_file: str = _option("", "JSON lines of conversations to learn (required)")
    output_dir: str = _option("", "folder for the result and for checkpoints on the way (required)")
    model_path: str = _option("nano", "what to start from: 'nano', a checkpoint folder or a name on the hub")
    eval_file: str | None = _option(None, "JSON lines of conversations to measure the loss on")
    eval_share: float = _option(0.0, "part of train_file to measure the loss on instead of learning it", low=0, below=1)
    skip_bad: bool = _option(False, "go on without the lines that cannot be used")
    check_samples: bool = _option(
        True, "encode every conversation once before training, so that no bad picture stops it half-way"
    )

    vision: str = _option(FROZEN, "how the vision tower is trained", choices=(FROZEN, LORA, FULL))
    projector: str = _option(
        FROZEN,
        "how the projector is trained, and the two vectors for line ends and separator of pictures; "
        "beside LoRA these two stay frozen: adapters hold layers only",
        choices=(FROZEN, FULL),
    )
    language: str = _option(LORA, "how the language model is trained", choices=(FROZEN, LORA, FULL))
    lora_rank: int = _option(16, "rank of LoRA's matrices", low=1)
    lora_alpha: float = _option(32.0, "LoRA's updates are scaled by lora_alpha / lora_rank", above=0)
    lora_dropout: float = _option(0.0, "dropout in front of LoRA's matrices; 0 with experts", low=0, below=1)
    lora_targets: list[str] = dataclasses.field(
        default_factory=lambda: [ALL],
        metadata=_rules("layers that get LoRA; experts are the routed ones", choices=(ATTENTION, MLP, EXPERTS, ALL)),
    )
    new_words: list[str] | None = dataclasses.field(
        default=None,
        metadata=_rules(
            "words that the model has not met: their tokens' rows of the embeddings and of the output layer are "
            "trained beside LoRA, which leaves both as they are"
        ),
    )
    aux_loss_alpha: float | None = _option(
        None,
        "weight of the loss that keeps experts evenly busy (arXiv:2405.04434); null: the checkpoint's own; without "
        "effect on routers of noaux_tc",
        low=0,
    )
    router_bias_update_speed: float | None = _option(
        None,
        "step of the routers' bias of noaux_tc after each optimizer step (arXiv:2408.15664); null: "
        f"{PUBLISHED_BIAS_SPEED} if the language model is trained in full, else 0",
        low=0,
    )

    learning_rate: float = _option(1e-4, "highest learning rate", above=0)
    vision_learning_rate: float | None = _option(None, "that of the vision tower; null: learning_rate", above=0)
    projector_learning_rate: float | None = _option(None, "that of the projector; null: learning_rate", above=0)
    weight_decay: float = _option(0.0, "AdamW's, for matrices only", low=0)
    max_grad_norm: float = _option(1.0, "longer gradients are shortened to this norm", above=0)
    schedule: str = _option(
        "cosine", "course of the learning rate after the warm-up", choices=("cosine", "linear", "constant")
    )
    warmup_share: float = _option(0.03, "part of the steps over which the learning rate rises", low=0, below=1)
    epochs: float = _option(1.0, "times that the data is gone through", above=0)
    max_steps: int | None = _option(None, "optimizer steps, instead of epochs", low=1)
    batch_size: int = _option(1, "conversations at once on each device", low=1)
    gradient_accumulation: int = _option(1, "batches to an optimizer step", low=1)
    eval_batch_size: int = _option(1, "conversations at once when measuring", low=1)

    precision: str = _option(
        FLOAT32,
        "bf16_autocast keeps float32 weights and computes in bfloat16; bf16_weights halves the memory too",
        choices=(FLOAT32, BF16_AUTOCAST, BF16_WEIGHTS),
    )
    gradient_checkpointing: bool = _option(False, "compute activations twice to save memory")
    device: str = _option("auto", "auto takes CUDA or MPS where there is one", choices=("auto", "cpu"))
    num_workers: int = _option(0, "processes that prepare pictures; 0: the training itself does", low=0)
    seed: int = _option(0, "of LoRA's start, the order of the data, and dropout", low=0, high=2**32 - 1)

    log_every: int = _option(10, "steps between two records of the loss", low=1)
    eval_every: int | None = _option(None, "steps between two measurements; null: after every epoch", low=1)
    save_every: int = _option(500, "steps between two checkpoints to resume from", low=1)
    keep_checkpoints: int = _option(2, "newest checkpoints to keep", low=1)
    tensorboard: bool = _option(False, "write the records for tensorboard to output_dir/tensorboard")
    resume: str = _option(
        "auto",
        "auto goes on from the newest checkpoint in output_dir; never refuses a folder that has one",
        choices=("auto", "never"),
    )

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in fields(self):
            setattr(self, field.name, _checked(field, hints[field.name], getattr(self, field.name)))
        self._check_together()

    def _check_together(self) -> None:
        for name in ("train_file", "output_dir"):
            if not getattr(self, name):
                raise _refusal(name, getattr(self, name), "it is required: a path")
        if self.eval_file and self.eval_share:
            raise _refusal("eval_share", self.eval_share, "0 with an eval_file, which is measured instead")
        if {self.vision, self.projector, self.language} == {FROZEN}:
            raise _refusal("language", FROZEN, "lora or full, as vision and projector are frozen too")
        if self.vision == LORA and self.language == FULL:
            raise _refusal("vision", LORA, "frozen or full with language: full, as the result is no adapter")
        if self.lora_dropout and self.uses_expert_lora:
            raise _refusal("lora_dropout", self.lora_dropout, "0 while lora_targets include the experts")
        if self.new_words and self.language != LORA:
            other = "which trains every row" if self.language == FULL else "which trains no row"
            raise _refusal("new_words", self.new_words, f"null with language: {self.language}, {other}")
        if self.new_words and not all(word.strip() for word in self.new_words):
            raise _refusal("new_words", self.new_words, "a list of words without empty ones")
        if self.router_bias_update_speed and self.language != FULL:
            raise _refusal(
                "router_bias_update_speed",
                self.router_bias_update_speed,
                f"0 or null with language: {self.language}, as the bias belongs to the full language model",
            )

    @property
    def uses_lora(self) -> bool:
        """Whether the result is an adapter and not a whole model."""
        return LORA in (self.vision, self.language)

    @property
    def uses_expert_lora(self) -> bool:
        """Whether routed experts get LoRA."""
        return self.language == LORA and bool({EXPERTS, ALL} & set(self.lora_targets))

    @property
    def bias_update_speed(self) -> float:
        """`router_bias_update_speed` with null resolved."""
        if self.router_bias_update_speed is not None:
            return self.router_bias_update_speed
        return PUBLISHED_BIAS_SPEED if self.language == FULL else 0.0

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Builds the settings from keys and values.

        Raises:
            ValueError: an unknown key, or what the class itself refuses.
        """
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                raise ValueError(f"unknown key {name!r} (value {values[name]!r}); allowed are {', '.join(names)}")
        return cls(**values)


def read_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML or JSON file.

    Args:
        path: the file; JSON is YAML too.
        overrides: texts `key=value` that replace the file's values, the value written as in YAML.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no YAML, or `TrainConfig.from_mapping` refuses its content.
    """
    values = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; it must hold keys and values, such as seed: 1")
    for override in overrides:
        name, sign, value = override.partition("=")
        if not sign:
            raise ValueError(f"--set {override!r} is no key=value")
        values[name.strip()] = _parse_yaml(value, f"--set {override}")
    return TrainConfig.from_mapping(values)


def explain_keys() -> str:
    """Every key, its default and its explanation, a line each."""
    lines = []
    for field in fields(TrainConfig):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        choices = f" ({', '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
        lines.append(f"{field.name}: {json.dumps(default)}  # {field.metadata['explanation']}{choices}")
    return "\n".join(lines)


def _parse_yaml(text: str, where: str) -> Any:
    # Not all JSON is YAML: YAML has no tabs in front of keys.
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a ValueError: of the 45th of January
        raise ValueError(f"{where} is neither YAML nor JSON: {' '.join(str(error).split())}") from error


def _refusal(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{name}: {value!r} is not allowed; allowed is {allowed}")


def _checked(field: "dataclasses.Field[Any]", annotation: Any, value: Any) -> Any:
    """The value in the field's own type.

    Raises:
        ValueError: it is of another type or out of range.
    """
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if value is None and type(None) in options:
        return None
    converted = _convert(options[0], value)
    if converted is None or not _is_within(converted, field.metadata):
        null = " or null" if type(None) in options else ""
        raise _refusal(field.name, value, _describe(options[0], field.metadata) + null)
    return converted


def _convert(kind: Any, value: Any) -> Any:
    """The value as `kind`, or None if it is of another type."""
    if kind is float:
        return _to_float(value)
    if typing.get_origin(kind) is list:
        entries = [value] if isinstance(value, str) else value
        is_list = isinstance(entries, (list, tuple)) and entries and all(isinstance(entry, str) for entry in entries)
        return list(entries) if is_list else None
    return value if type(value) is kind else None


def _to_float(value: Any) -> float | None:
    # YAML reads 1e-4, which has no point, as text.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _is_within(value: Any, metadata: Mapping[str, Any]) -> bool:
    if metadata["choices"]:
        return all(entry in metadata["choices"] for entry in (value if isinstance(value, list) else [value]))
    if isinstance(value, (bool, str, list)):
        return True
    low, high, above, below = (metadata[name] for name in ("low", "high", "above", "below"))
    return (
        (isinstance(value, int) or math.isfinite(value))
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def _describe(kind: Any, metadata: Mapping[str, Any]) -> str:
    """What a key may be, in words."""
    if metadata["choices"]:
        choices = ", ".join(metadata["choices"])
        return f"a list of {choices}" if typing.get_origin(kind) is list else f"one of {choices}"
    if typing.get_origin(kind) is list:
        return "a list of texts, at least one"
    if kind in (bool, str):
        return {bool: "true or false", str: "text"}[kind]
    words = {"low": "at least", "high": "at most", "above": "above", "below": "below"}
    bounds = [f"{word} {metadata[name]:g}" for name, word in words.items() if metadata[name] is not None]
    return ("a whole number" if kind is int else "a number") + (" " + " and ".join(bounds) if bounds else "")
