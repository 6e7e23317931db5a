"""Checkpoints and conversations that the tests of this folder share; none changes them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from training_models import VARIANTS, build_processor, save_conversations, save_model

from deepseek_vl2.models import DeepseekVLV2Processor


@pytest.fixture(scope="session")
def processor() -> DeepseekVLV2Processor:
    return build_processor()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, processor: DeepseekVLV2Processor) -> Callable[[str], Path]:
    """Gives the folder of a variant's checkpoint."""
    folders: dict[str, Path] = {}

    def folder_of(variant: str) -> Path:
        if variant not in folders:
            folders[variant] = save_model(tmp_path_factory.mktemp(variant), processor, **VARIANTS[variant])
        return folders[variant]

    return folder_of


@pytest.fixture(scope="session")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_conversations(tmp_path_factory.mktemp("data"))
