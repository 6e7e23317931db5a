"""Fine-tuning from settings to the saved result, on transformers' `Trainer`."""

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from deepseek_vl2.models import DeepseekV2Config, DeepseekVLV2ForCausalLM, DeepseekVLV2Processor
from deepseek_vl2.train.collator import TrainingCollator
from deepseek_vl2.train.config import BF16_AUTOCAST, BF16_WEIGHTS, TrainConfig
from deepseek_vl2.train.data import ConversationDataset, ConversationEncoder, Sample, read_samples, split_samples
from deepseek_vl2.train.lora import add_adapter
from deepseek_vl2.train.parts import count_trained, parameter_groups, unfreeze
from deepseek_vl2.train.router_bias import RouterBiasUpdate
from deepseek_vl2.utils.adapter import require_peft
from deepseek_vl2.utils.data_files import parse_json, write_whole
from deepseek_vl2.utils.io import load_pretrained_model
from deepseek_vl2.utils.run_folder import file_digest

logger = logging.getLogger(__name__)

CONFIG_FILE = "train_config.json"
# Beside the settings stands what the files of data held.
_DATA_FILES = ("train_file", "eval_file")
# What a run may change when it goes on, as the curve of the loss stays the same.
_FREE_KEYS = frozenset(
    [
        "output_dir",
        "check_samples",
        "device",
        "num_workers",
        "log_every",
        "save_every",
        "keep_checkpoints",
        "tensorboard",
        "resume",
    ]
)
_CHECKPOINT_NAME = re.compile(r"checkpoint-\d+")
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class TrainResult:
    """What came of a run.

    Attributes:
        output_dir: holds the adapter or the whole model, with its processor.
        num_steps: optimizer steps, those before a resumption included.
        train_loss: last recorded loss of training; None if there were fewer steps than `log_every`.
        eval_loss: loss on what is measured, after the last step; None if nothing is.
        num_trained: trained weights.
    """

    output_dir: Path
    num_steps: int
    train_loss: float | None
    eval_loss: float | None
    num_trained: int


class FineTuner(Trainer):
    """transformers' `Trainer` with learning rates by part and this model's ways of losses and checkpoints.

    Args:
        config: settings of the run.
        model: the model, or the model with an adapter.
        router_config: read by the routers; holds the weight of the balancing loss.
        **kwargs: as for `Trainer`.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, router_config: DeepseekV2Config, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        self.config = config
        self.router_config = router_config

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW on the trained parameters, see `parameter_groups`."""
        if self.optimizer is None:
            trained: Any = model or self.model
            self.optimizer = torch.optim.AdamW(parameter_groups(trained, self.config))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """The learning rate over the steps; its first one is 0 while it rises, so a run of a few steps begins high."""
        self.args.warmup_steps = int(self.config.warmup_share * num_training_steps)
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own loss; a cache would only take memory."""
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One batch forward and backward.

        The balancing loss acts on the gradient of every batch by itself; as one of several batches to a step it counts
        for its part.
        """
        alpha = self.router_config.aux_loss_alpha
        self.router_config.aux_loss_alpha = alpha / self.current_gradient_accumulation_steps
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            self.router_config.aux_loss_alpha = alpha

    def go_on(self, checkpoint: Path) -> None:
        """Trains from a checkpoint to the end; where it is the end, `Trainer` would take one more step."""
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step < state.max_steps:
            self.train(resume_from_checkpoint=str(checkpoint))
            return
        self._load_from_checkpoint(str(checkpoint))
        self.state = state

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Loads a whole model as `from_pretrained` does: in the file experts stand one by one."""
        target: Any = model or self.model
        if self.config.uses_lora:
            super()._load_from_checkpoint(resume_from_checkpoint, target)
            return
        saved: Any = DeepseekVLV2ForCausalLM.from_pretrained(resume_from_checkpoint, dtype=torch.float32)
        target.load_state_dict(saved.state_dict())


class StopAtInvalidLoss(TrainerCallback):
    """Ends a run whose loss is no number any more, which no further step can mend."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Looks at each recorded loss.

        Raises:
            ValueError: it is not finite.
        """
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {state.global_step}: lower learning_rate or max_grad_norm")


def train(config: TrainConfig) -> TrainResult:
    """Fine-tunes a model and saves the result in `config.output_dir`.

    Raises:
        ValueError: data, model or the state in the output folder do not fit the settings, or the loss is no number.
        OSError: something cannot be read or written.
        ImportError: peft or tensorboard is needed and not installed.
    """
    if config.uses_lora:
        require_peft()
    checkpoint = find_checkpoint(config)
    arguments = training_arguments(config)
    set_seed(config.seed)
    dtype = torch.bfloat16 if config.precision == BF16_WEIGHTS else torch.float32
    _, processor, model = load_pretrained_model(config.model_path, dtype, device="cpu")
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"{config.model_path} is quantised and cannot be trained: train the original, then quantise it"
        )
    learned, measured = read_data(config, processor, model)
    arguments.eval_strategy = arguments.eval_strategy if measured else "no"
    router_config = model.language.config
    if config.aux_loss_alpha and router_config.topk_method == "noaux_tc":
        logger.warning(
            "aux_loss_alpha %s has no effect: the routers of %s (noaux_tc) are balanced by their bias, not by a loss; "
            "see router_bias_update_speed",
            config.aux_loss_alpha,
            config.model_path,
        )
    if config.aux_loss_alpha is not None:
        router_config.aux_loss_alpha = config.aux_loss_alpha
    unfreeze(model, config)
    callbacks: list[TrainerCallback] = [StopAtInvalidLoss()]
    if config.bias_update_speed:
        callbacks.append(RouterBiasUpdate(model, config.bias_update_speed))
    if config.tensorboard:
        callbacks.append(_tensorboard(config, _num_steps(checkpoint) if checkpoint else 0))
    trained: Any = add_adapter(model, processor.tokenizer, config) if config.uses_lora else model
    num_trained = count_trained(trained)
    logger.info(
        "%d conversations to learn, %d to measure, %d trained weights", *map(len, (learned, measured)), num_trained
    )
    trainer = FineTuner(
        config,
        trained,
        router_config,
        args=arguments,
        data_collator=TrainingCollator(processor),
        train_dataset=learned,
        eval_dataset=measured if len(measured) else None,
        processing_class=processor,
        callbacks=callbacks,
    )
    try:
        trainer.go_on(checkpoint) if checkpoint else trainer.train()
    finally:
        _close_bars(trainer)
    trainer.save_model()

    def last(name: str) -> float | None:
        return next((record[name] for record in reversed(trainer.state.log_history) if name in record), None)

    steps = trainer.state.global_step
    return TrainResult(Path(config.output_dir), steps, last("loss"), last("eval_loss"), num_trained)


def _close_bars(trainer: Trainer) -> None:
    """Ends the line of progress of a run that was broken off, so that what is said next has its own."""
    for callback in trainer.callback_handler.callbacks:
        for bar in (getattr(callback, name, None) for name in ("training_bar", "prediction_bar")):
            if bar is not None:
                bar.close()


def read_data(
    config: TrainConfig, processor: DeepseekVLV2Processor, model: DeepseekVLV2ForCausalLM
) -> tuple[ConversationDataset, ConversationDataset]:
    """Reads what is learnt and what is measured; the second may be empty.

    Raises:
        ValueError: see `read_samples` and `split_samples`.
        OSError: a file cannot be read.
    """
    encoder = ConversationEncoder(processor, model.language.config)

    def read(name: str) -> list[Sample]:
        return read_samples(Path(name), encoder, config.skip_bad, config.check_samples)

    learned = read(config.train_file)
    measured: list[Sample] = []
    if config.eval_file:
        measured = read(config.eval_file)
    elif config.eval_share:
        learned, measured = split_samples(learned, config.eval_share, config.seed)
    return ConversationDataset(learned, encoder), ConversationDataset(measured, encoder)


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """The settings in transformers' terms."""
    arguments = TrainingArguments(
        output_dir=config.output_dir,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler_type=_SCHEDULES[config.schedule],
        bf16=config.precision == BF16_AUTOCAST,
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        use_cpu=config.device == "cpu",
        seed=config.seed,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.eval_every else "epoch",
        eval_steps=config.eval_every,
        prediction_loss_only=True,
        label_names=["labels"],
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=config.keep_checkpoints,
        dataloader_num_workers=config.num_workers,
        dataloader_pin_memory=torch.cuda.is_available() and config.device == "auto",
        remove_unused_columns=False,
        report_to="none",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several devices by `accelerate launch`, one process each: pictures cannot be split up
    return arguments


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The newest complete checkpoint to go on from, or None; notes the settings in the output folder.

    Raises:
        ValueError: there is one with other settings or data, one although `resume` is never, or a folder that is named
            like one and is none.
        OSError: the folder cannot be written, or the data not read.
    """
    folder = Path(config.output_dir)
    digests = _data_digests(config)
    other = [path.name for path in folder.glob("checkpoint-*") if not _CHECKPOINT_NAME.fullmatch(path.name)]
    if other:
        # A copy of a user's; transformers would delete it with the oldest checkpoints.
        raise ValueError(
            f"{folder} holds {other[0]}, which is no checkpoint of this run: give it a name of another kind"
        )
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}") if _is_whole(path)]
    newest = max(complete, key=_num_steps, default=None)
    if newest and config.resume == "never":
        raise ValueError(f"resume: never, but {folder} holds {newest.name}; take another output_dir, or remove it")
    if newest:
        _check_same_settings(config, digests, folder / CONFIG_FILE)
        logger.info("going on from %s", newest)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CONFIG_FILE, json.dumps(asdict(config) | digests, indent=1) + "\n")
    return newest


def _data_digests(config: TrainConfig) -> dict[str, str | None]:
    """Digests of the files of data, by the key under which they are noted; None where there is no file."""
    paths = {name: getattr(config, name) for name in _DATA_FILES}
    return {f"{name}_digest": file_digest(Path(path)) if path else None for name, path in paths.items()}


def _num_steps(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(state_file: Path) -> bool:
    """Whether a checkpoint's state, which is written last, has been written to its end."""
    try:
        parse_json(state_file.read_bytes())
    except ValueError:
        return False
    return True


def _check_same_settings(config: TrainConfig, digests: Mapping[str, str | None], path: Path) -> None:
    before = parse_json(path.read_bytes()) if path.is_file() else {}
    for field in fields(config):
        value = getattr(config, field.name)
        # A run of an earlier version has not noted a key that came later, and did as its default says.
        began_with = before.get(field.name, field.default)
        if field.name not in _FREE_KEYS and value != began_with:
            raise ValueError(
                f"{field.name}: {value!r} is not allowed; the run in {path.parent} began with {began_with!r}. "
                "Keep that, or take another output_dir"
            )
    for name in _DATA_FILES:
        key = f"{name}_digest"
        # A run of an earlier version has not noted it.
        if before.get(key, digests[key]) != digests[key]:
            raise ValueError(
                f"{name}: {getattr(config, name)} has changed since the run in {path.parent} began. "
                "Put its old content back, or take another output_dir"
            )


def _tensorboard(config: TrainConfig, num_steps: int) -> TrainerCallback:
    """Records for tensorboard.

    Args:
        config: says where.
        num_steps: that are done already. Later records are of steps that will be done again: they no longer count.

    Raises:
        ImportError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard: true needs the package tensorboard: pip install 'deepseek_vl2[train]'"
        ) from error
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(Path(config.output_dir) / "tensorboard", purge_step=num_steps + 1))
