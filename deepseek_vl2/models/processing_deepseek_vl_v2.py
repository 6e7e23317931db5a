"""The processor: conversations and pictures in, tensors for the model out."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from deepseek_vl2.models.chat_format import (
    ANSWER_START,
    Speaker,
    build_chat_template,
    content_text,
    pictures_in,
    speaker_of,
)
from deepseek_vl2.models.conversation import get_conv_template
from deepseek_vl2.models.image_transform import ImageTransform
from deepseek_vl2.models.processor_inputs import (
    check_messages,
    check_transformers_arguments,
    checked_pictures,
    checked_resolutions,
    pictures_by_text,
)
from deepseek_vl2.models.processor_outputs import BatchCollateOutput, VLChatProcessorOutput, collate
from deepseek_vl2.models.special_tokens import CHAT_TOKENS, GROUNDING_TOKENS, IMAGE, PAD, USER
from deepseek_vl2.models.tiling import MAX_TILED_IMAGES, TileGrid, choose_grid, num_image_tokens, select_best_resolution
from deepseek_vl2.models.tokenizer_setup import add_missing_tokens, check_byte_level

__all__ = [
    "BatchCollateOutput",
    "DeepseekVLV2Processor",
    "ImageTransform",
    "VLChatProcessorOutput",
    "select_best_resolution",
]

logger = logging.getLogger(__name__)


class TokenizedText(NamedTuple):
    """A text with its pictures, encoded."""

    input_ids: list[int]
    images: list[torch.Tensor]  # views, each [3, S, S]
    images_seq_mask: list[bool]
    images_spatial_crop: list[TileGrid]
    num_image_tokens: list[int]  # of each picture

    @classmethod
    def empty(cls) -> "TokenizedText":
        """Return a new, empty one."""
        return cls([], [], [], [], [])

    def extend(self, other: "TokenizedText") -> None:
        """Append another text."""
        self.input_ids.extend(other.input_ids)
        self.images.extend(other.images)
        self.images_seq_mask.extend(other.images_seq_mask)
        self.images_spatial_crop.extend(other.images_spatial_crop)
        self.num_image_tokens.extend(other.num_image_tokens)


class TokenizedMessages(NamedTuple):
    """A conversation with its pictures, encoded."""

    input_ids: list[int]
    target_ids: list[int]
    images: list[torch.Tensor]
    images_seq_mask: list[bool]
    images_spatial_crop: list[TileGrid]
    num_image_tokens: list[int]


class DeepseekVLV2Processor(ProcessorMixin):
    """Encodes conversations with pictures for DeepSeek-VL2.

    Special tokens that the tokenizer lacks are added to it; `check_vocab` tells whether a model knows them.

    Args:
        tokenizer: a byte-level tokenizer; changed in place (special tokens, padding side, chat template).
        candidate_resolutions: canvases for tiling as (width, height); the first is one view, the others are multiples.
        patch_size: side of a patch in pixels.
        downsample_ratio: patches along the side of the square that becomes one image token.
        image_mean: of each channel, for values in [0, 1].
        image_std: of each channel.
        normalize: whether to apply mean and std.
        image_token: the mark for a picture in a text.
        pad_token: used if the tokenizer has none.
        add_special_token: kept for the files of published checkpoints; has no effect.
        sft_format: name of the conversation template.
        mask_prompt: whether labels of questions and of the system message become `ignore_id`.
        ignore_id: label that the loss leaves out.
        chat_template: Jinja template in place of the built-in one. One without `<|User|>` belongs to a language model
            and is not used.
        **kwargs: `processor_class` and other entries of published files; have no effect.

    Raises:
        ValueError: the tokenizer is corrupted or lacks bos, eos or pad; `candidate_resolutions` is malformed;
            `sft_format` is unknown.
    """

    def __init__(
        self,
        tokenizer: Any,
        candidate_resolutions: Sequence[Sequence[int]],
        patch_size: int,
        downsample_ratio: int,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        normalize: bool = True,
        image_token: str = IMAGE,
        pad_token: str = PAD,
        add_special_token: bool = False,
        sft_format: str = "deepseek",
        mask_prompt: bool = True,
        ignore_id: int = -100,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.candidate_resolutions = checked_resolutions(candidate_resolutions)
        self.image_size = self.candidate_resolutions[0][0]
        self.patch_size = patch_size
        self.downsample_ratio = downsample_ratio
        if not 0 < patch_size <= self.image_size or downsample_ratio < 1:
            raise ValueError(
                f"patch_size={patch_size} has to be 1 to {self.image_size} (a view's side), "
                f"downsample_ratio={downsample_ratio} at least 1"
            )
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.normalize = normalize
        self.image_transform = ImageTransform(self.image_mean, self.image_std, normalize)
        self.pad_token = pad_token
        self.add_special_token = add_special_token
        self.sft_format = get_conv_template(sft_format).name
        self.mask_prompt = mask_prompt
        self.ignore_id = ignore_id

        check_byte_level(tokenizer)
        self.image_token = image_token
        self.special_token_ids = add_missing_tokens(
            tokenizer, (image_token, *GROUNDING_TOKENS, *CHAT_TOKENS), pad_token
        )
        self.image_token_id = self.special_token_ids[image_token]
        tokenizer.padding_side = "left"

        if chat_template is not None and USER not in chat_template:
            logger.warning("the chat template found beside the processor is not DeepSeek-VL2's; using the built-in one")
            chat_template = None
        tokenizer.chat_template = chat_template or build_chat_template(image_token)
        super().__init__(tokenizer, chat_template=tokenizer.chat_template)

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Read the processor's file; see `ProcessorMixin`.

        Raises:
            FileNotFoundError: what can only be a path does not exist. It would be taken for a bad hub name.
        """
        name = str(pretrained_model_name_or_path)
        if name.startswith((".", "/", "~")) and not Path(name).exists():
            raise FileNotFoundError(f"there is no processor in {name!r}: no such folder")
        return super().get_processor_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _load_tokenizer_from_pretrained(
        cls, sub_processor_type: str, pretrained_model_name_or_path: Any, subfolder: str = "", **kwargs: Any
    ) -> Any:
        """Load tokenizer.json as it is, whatever `tokenizer_class` the folder names (see `check_byte_level`).

        Raises:
            OSError: there is no tokenizer.json, or it cannot be read.
        """
        name = pretrained_model_name_or_path
        try:
            return PreTrainedTokenizerFast.from_pretrained(name, subfolder=subfolder, **kwargs)
        except (OSError, ValueError) as error:
            raise OSError(
                f"cannot load tokenizer.json of {str(name)!r}: there is no such folder or hub name, it has no such "
                "file, or the hub cannot be reached. The bundled model needs no network: deepseek_vl2.nano.path(). "
                f"Cause: {error}"
            ) from error

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the processor from the entries of its file; see `ProcessorMixin`.

        Raises:
            ValueError: the folder has no processor_config.json, or it lacks required entries.
        """
        needed = ("candidate_resolutions", "patch_size", "downsample_ratio")
        lacking = [name for name in needed if name not in processor_dict and name not in kwargs]
        if lacking:
            raise ValueError(f"processor_config.json is missing or has no {', '.join(lacking)}")
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    # -- tokens ---------------------------------------------------------------------------------------------------

    @property
    def bos_id(self) -> int:
        """Id that begins every sequence."""
        return self.tokenizer.bos_token_id

    @property
    def eos_id(self) -> int:
        """Id that ends every answer."""
        return self.tokenizer.eos_token_id

    @property
    def pad_id(self) -> int:
        """Id that fills up a batch."""
        return self.tokenizer.pad_token_id

    @property
    def image_id(self) -> int:
        """Id of an image token, also `image_token_id`."""
        return self.image_token_id

    @property
    def num_tokens_per_side(self) -> int:
        """Image tokens along a side of one view (G)."""
        return math.ceil((self.image_size // self.patch_size) / self.downsample_ratio)

    @property
    def model_input_names(self) -> list[str]:
        """What the model takes of the processor's output."""
        return ["input_ids", "attention_mask", "images", "images_seq_mask", "images_spatial_crop"]

    def check_vocab(self, vocab_size: int) -> None:
        """Check that a model has an embedding for every special token.

        Args:
            vocab_size: rows of the model's embedding.

        Raises:
            ValueError: the tokenizer gave a special token an id that the model does not have.
        """
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id, **self.special_token_ids}
        outside = {token: token_id for token, token_id in ids.items() if token_id >= vocab_size}
        if outside:
            raise ValueError(
                f"the model has {vocab_size} embeddings, but the tokenizer gives the special tokens {outside}: "
                "tokenizer and model do not belong together, or the tokenizer came without its special tokens"
            )

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Encode text without pictures.

        Args:
            text: may hold special tokens.
            bos: whether to begin with the beginning-of-sentence id.
            eos: whether to end with the end-of-sentence id.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, t: Any, **kwargs: Any) -> str:
        """Decode ids to text; keyword arguments go to the tokenizer (`skip_special_tokens=True`)."""
        return self.tokenizer.decode(t, **kwargs)

    # -- prompts in print -----------------------------------------------------------------------------------------

    def new_chat_template(self) -> Any:
        """Return an empty conversation in this processor's format."""
        return get_conv_template(self.sft_format)

    def format_messages(
        self, conversations: Sequence[Mapping[str, Any]], sft_format: str = "deepseek", system_prompt: str = ""
    ) -> str:
        """Print a conversation, roles as they are written in it.

        Args:
            conversations: the messages of one conversation.
            sft_format: name of the template.
            system_prompt: put in front.
        """
        conversation = get_conv_template(sft_format)
        conversation.set_system_message(system_prompt)
        for message in conversations:
            conversation.append_message(message["role"], self._text_of(message))
        return conversation.get_prompt().strip()

    def format_prompts(self, prompts: str, sft_format: str = "deepseek", system_prompt: str = "") -> str:
        """Print one question as a conversation that waits for its answer.

        Args:
            prompts: the question.
            sft_format: name of the template.
            system_prompt: put in front.
        """
        conversation = get_conv_template(sft_format)
        conversation.set_system_message(system_prompt)
        conversation.append_message(conversation.roles[0], prompts.strip())
        conversation.append_message(conversation.roles[1], "")
        return conversation.get_prompt().strip()

    # -- encoding -------------------------------------------------------------------------------------------------

    def tokenize_with_images(
        self,
        conversation: str,
        images: Sequence[Image.Image],
        bos: bool = True,
        eos: bool = True,
        cropping: bool = True,
    ) -> TokenizedText:
        """Encode a text and put the image tokens of a picture where its mark stands.

        Args:
            conversation: text with one `<image>` mark a picture.
            images: the pictures, in order.
            bos: whether to begin with the beginning-of-sentence id.
            eos: whether to end with the end-of-sentence id.
            cropping: whether pictures are tiled.

        Raises:
            ValueError: the number of pictures is not the number of marks.
        """
        result = self._tokenize(conversation, [image.size for image in images], bos, eos, cropping)
        self._add_views(result, images)
        return result

    def format_messages_v2(
        self, messages: Sequence[Mapping[str, Any]], pil_images: Sequence[Image.Image], cropping: bool = True
    ) -> TokenizedMessages:
        """Encode a conversation message by message, as the model was trained on it.

        A question ends with the assistant's mark; an answer is encoded on its own and ends with eos.

        Args:
            messages: the conversation.
            pil_images: its pictures, in order.
            cropping: whether pictures are tiled while they are few; `False` never tiles.

        Raises:
            ValueError: the number of pictures is not the number of marks; an unknown role; a picture in an answer;
                a system message that is not the first.
        """
        text, targets = self._tokenize_messages(messages, [image.size for image in pil_images], cropping)
        self._add_views(text, pil_images)
        return TokenizedMessages(text.input_ids, targets, *text[1:])

    def count_tokens(
        self,
        conversations: Sequence[Mapping[str, Any]],
        image_sizes: Sequence[tuple[int, int]] = (),
        inference_mode: bool = True,
        cropping: bool = True,
    ) -> int:
        """Count the ids that `process_one` gives a conversation, without touching its pictures.

        Args:
            conversations: the messages.
            image_sizes: (width, height) of the pictures, in order.
            inference_mode: see `process_one`.
            cropping: see `process_one`.

        Raises:
            ValueError: see `format_messages_v2`.
        """
        check_messages(conversations)
        text, _ = self._tokenize_messages(conversations, image_sizes, cropping)
        return self._end(text.input_ids, inference_mode)

    def process_one(
        self,
        prompt: str | None = None,
        conversations: Sequence[Mapping[str, Any]] | None = None,
        images: Sequence[Image.Image] | None = None,
        apply_sft_format: bool = False,
        inference_mode: bool = True,
        system_prompt: str = "",
        cropping: bool = True,
    ) -> VLChatProcessorOutput:
        """Encode one conversation or one prompt.

        Args:
            prompt: text to encode as it is, or
            conversations: messages with `role` and `content`.
            images: pictures for the `<image>` marks, in order. `None` takes those that the messages carry themselves.
            apply_sft_format: whether to print `prompt` as a question first.
            inference_mode: whether to leave out an eos at the end, so that generation goes on from there.
            system_prompt: changes the printed `sft_format` only; give the model a message of role `system` instead.
            cropping: whether pictures are tiled while they are few; `False` never tiles.

        Raises:
            ValueError: both or neither of prompt and conversation; an empty one; anything that
                `format_messages_v2` refuses; an item of `images` that is not a PIL picture.
        """
        if prompt is not None and conversations is not None:
            raise ValueError("give either prompt or conversations, not both")
        if not prompt and not conversations:
            raise ValueError("nothing to encode: the conversation (or prompt) is empty")
        if conversations:
            check_messages(conversations)
            pictures = checked_pictures(pictures_in(conversations) if images is None else images)
            printed = self.format_messages(conversations, self.sft_format, system_prompt)
            encoded = self.format_messages_v2(conversations, pictures, cropping)
        else:
            pictures = checked_pictures([] if images is None else images)
            printed = prompt or ""
            if apply_sft_format:
                printed = self.format_prompts(printed, self.sft_format, system_prompt)
            cropping = cropping and len(pictures) <= MAX_TILED_IMAGES
            text = self.tokenize_with_images(printed, pictures, cropping=cropping)
            encoded = TokenizedMessages(text.input_ids, text.input_ids, *text[1:])
        return self._sample(printed, encoded, drop_eos=inference_mode)

    def __call__(  # type: ignore[override]
        self,
        *,
        prompt: str | None = None,
        conversations: Sequence[Mapping[str, Any]] | None = None,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        apply_sft_format: bool = False,
        force_batchify: bool = True,
        inference_mode: bool = True,
        system_prompt: str = "",
        cropping: bool = True,
        **kwargs: Any,
    ) -> VLChatProcessorOutput | BatchCollateOutput | BatchFeature:
        """Encode one conversation or prompt, or (with `text`) printed prompts in the way of transformers.

        Args:
            prompt: see `process_one`.
            conversations: see `process_one`.
            images: see `process_one`; with `text` also one list a text, and addresses of pictures.
            text: one or several prompts with all special tokens, as `apply_chat_template` prints them.
            apply_sft_format: see `process_one`.
            force_batchify: whether to return a batch of one instead of a sample.
            inference_mode: see `process_one`.
            system_prompt: see `process_one`.
            cropping: see `process_one`; has no effect with `text`.
            **kwargs: arguments that transformers passes; only `padding_side` has an effect, and only with `text`.

        Returns:
            A batch (`force_batchify`), a sample, or with `text` a `BatchFeature` of exactly what the model takes.

        Raises:
            ValueError: see `process_one`; a `return_tensors` other than `pt`; truncation.
            TypeError: an unknown argument.
        """
        padding_side = kwargs.pop("padding_side", "left")
        check_transformers_arguments(kwargs)
        if text is not None:
            if prompt is not None or conversations is not None:
                raise ValueError("give one of text, prompt and conversations, not several")
            return self._encode_texts([text] if isinstance(text, str) else list(text), images, padding_side)
        sample = self.process_one(
            prompt=prompt,
            conversations=conversations,
            images=images,
            apply_sft_format=apply_sft_format,
            inference_mode=inference_mode,
            system_prompt=system_prompt,
            cropping=cropping,
        )
        return self.batchify([sample]) if force_batchify else sample

    def batchify(self, sample_list: Sequence[VLChatProcessorOutput], padding: str = "left") -> BatchCollateOutput:
        """Join samples to a batch.

        See `collate` for what becomes of labels.

        Args:
            sample_list: what `process_one` returned.
            padding: `left` to generate, `right` to train.

        Raises:
            ValueError: no samples, or another padding.
        """
        return collate(sample_list, self.pad_id, self.ignore_id, padding)

    # -- parts ----------------------------------------------------------------------------------------------------

    def _tokenize(
        self, text: str, image_sizes: Sequence[tuple[int, int]], bos: bool, eos: bool, cropping: bool
    ) -> TokenizedText:
        """See `tokenize_with_images`; the views are left out."""
        texts = text.split(self.image_token)
        if len(texts) - 1 != len(image_sizes):
            raise ValueError(
                f"{len(image_sizes)} picture(s) given for {len(texts) - 1} {self.image_token} mark(s) in "
                f"{text[:80]!r}: every mark needs one picture"
            )
        result = TokenizedText.empty()

        def append(ids: list[int], is_image: bool) -> None:
            result.input_ids.extend(ids)
            result.images_seq_mask.extend([is_image] * len(ids))

        append(self.encode(texts[0], bos=bos), False)
        num_images = 1 if cropping else MAX_TILED_IMAGES + 1
        for size, following in zip(image_sizes, texts[1:], strict=True):
            grid = choose_grid(size, num_images, self.image_size, self.candidate_resolutions)
            count = num_image_tokens(grid, self.num_tokens_per_side)
            append([self.image_token_id] * count, True)
            append(self.encode(following, bos=False), False)
            result.images_spatial_crop.append(grid)
            result.num_image_tokens.append(count)
        append([self.eos_id] * eos, False)
        return result

    def _tokenize_messages(
        self, messages: Sequence[Mapping[str, Any]], image_sizes: Sequence[tuple[int, int]], cropping: bool = True
    ) -> tuple[TokenizedText, list[int]]:
        """Ids and labels of a conversation, see `format_messages_v2`; the views are left out."""
        template = self.new_chat_template()
        speakers = [speaker_of(message["role"], template) for message in messages]
        texts = [self._text_of(message) for message in messages]
        for i, (speaker, text) in enumerate(zip(speakers, texts, strict=True)):
            if speaker is Speaker.USER:
                texts[i] = self._question(text)
            elif self.image_token in text:
                raise ValueError(f"message {i} is of role {messages[i]['role']!r} and cannot hold {self.image_token}")
            elif speaker is Speaker.SYSTEM and i > 0:
                raise ValueError(f"message {i} is a system message: only the first message can be one")
        self._check_count(sum(text.count(self.image_token) for text in texts), len(image_sizes))

        result = TokenizedText.empty()
        result.input_ids.append(self.bos_id)
        result.images_seq_mask.append(False)
        targets = [self.bos_id]
        sizes = iter(image_sizes)
        cropping = cropping and len(image_sizes) <= MAX_TILED_IMAGES
        for speaker, text in zip(speakers, texts, strict=True):
            own = [next(sizes) for _ in range(text.count(self.image_token))]
            part = self._tokenize(text, own, bos=False, eos=speaker is Speaker.ASSISTANT, cropping=cropping)
            hidden = self.mask_prompt and speaker is not Speaker.ASSISTANT
            targets += [self.ignore_id] * len(part.input_ids) if hidden else part.input_ids
            result.extend(part)
        return result, targets

    def _add_views(self, text: TokenizedText, images: Sequence[Image.Image]) -> None:
        """Cut the pictures into the views that the text has room for."""
        for image, grid in zip(images, text.images_spatial_crop, strict=True):
            text.images.extend(self.image_transform.views(image, grid, self.image_size))

    def _text_of(self, message: Mapping[str, Any]) -> str:
        return content_text(message.get("content"), self.image_token).strip()

    def _question(self, text: str) -> str:
        """Print a question alone, up to where its answer begins."""
        template = self.new_chat_template()
        template.append_message(template.roles[0], text)
        template.append_message(template.roles[1], "")
        return template.get_prompt()

    def _check_count(self, num_marks: int, num_pictures: int) -> None:
        if num_marks != num_pictures:
            raise ValueError(
                f"{num_pictures} picture(s) given for {num_marks} {self.image_token} mark(s) in the conversation: "
                "every mark needs one picture, and every picture one mark"
            )

    def _end(self, input_ids: list[int], drop_eos: bool) -> int:
        """Number of ids that are kept."""
        return len(input_ids) - (drop_eos and input_ids[-1] == self.eos_id)

    def _sample(self, printed: str, encoded: TokenizedMessages, drop_eos: bool) -> VLChatProcessorOutput:
        end = self._end(encoded.input_ids, drop_eos)
        input_ids = torch.tensor(encoded.input_ids[:end], dtype=torch.long)
        target_ids = torch.tensor(encoded.target_ids[:end], dtype=torch.long)
        target_ids[input_ids == self.image_token_id] = self.ignore_id
        side = self.image_size
        return VLChatProcessorOutput(
            sft_format=printed,
            input_ids=input_ids,
            target_ids=target_ids,
            images=torch.stack(encoded.images) if encoded.images else torch.zeros(1, 3, side, side),
            images_seq_mask=torch.tensor(encoded.images_seq_mask[:end], dtype=torch.bool),
            images_spatial_crop=torch.tensor(encoded.images_spatial_crop or [(0, 0)], dtype=torch.long),
            num_image_tokens=encoded.num_image_tokens,
        )

    def _encode_texts(self, texts: list[str], images: Any, padding_side: str) -> BatchFeature:
        """Encode printed prompts, each with its pictures, to a padded batch."""
        counts = [text.count(self.image_token) for text in texts]
        rows = zip(texts, pictures_by_text(images, counts), strict=True)
        batch = self.batchify([self._encode_text(text, pictures) for text, pictures in rows], padding_side)
        data = {name: batch[name] for name in self.model_input_names}
        data["attention_mask"] = data["attention_mask"].long()
        return BatchFeature(data)

    def _encode_text(self, text: str, pictures: Sequence[Image.Image]) -> VLChatProcessorOutput:
        """Encode a printed prompt to the ids that the same conversation would give."""
        self._check_count(text.count(self.image_token), len(pictures))
        remaining = iter(pictures)
        result = TokenizedText.empty()
        for i, piece in enumerate(ANSWER_START.split(text.removeprefix(self.tokenizer.bos_token))):
            own = [next(remaining) for _ in range(piece.count(self.image_token))]
            cropping = len(pictures) <= MAX_TILED_IMAGES
            result.extend(self.tokenize_with_images(piece, own, bos=i == 0, eos=False, cropping=cropping))
        encoded = TokenizedMessages(result.input_ids, result.input_ids, *result[1:])
        return self._sample(text, encoded, drop_eos=False)
