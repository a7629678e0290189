"""The tiny configuration, its model, and copies of it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import wandb
from torch.utils.data import DataLoader
from transformers import XLMRobertaModel

from bge_pruning.config.load import Config
from bge_pruning.model_io.checkpoint import RunMetadata
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.model_io.teacher_folder import Teacher
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.training import builders
from bge_pruning.training.data_builders import build_train_loader
from bge_pruning.training.plan import build_loss_weights, build_plan
from bge_pruning.training.teacher_cache import TeacherTargets

NO_TEACHER = ("loss.distillation_alignment=0", "loss.distillation_similarity=0")


@pytest.fixture
def base(configure) -> BaseModel:
    return builders.build_base_model(configure())


@pytest.fixture
def load(configure, base) -> Callable[..., DataLoader]:
    """A function that makes the training batches of a run without a teacher."""
    return lambda *a: build_train_loader(configure(*a, *NO_TEACHER), base, None).dataloader


@pytest.fixture
def load_cached(base) -> Callable[..., DataLoader]:
    """A function that makes the training batches of a run with the teacher's outputs from disk."""

    def load(config: Config, model: BaseModel = base, teacher: Teacher | None = None) -> DataLoader:
        teacher = teacher or builders.build_teacher(config, model)
        loader = build_train_loader(config, model, teacher).dataloader
        names = build_loss_weights(config).distilled
        targets = TeacherTargets(config, model, teacher, names, loader.batch_sampler)
        assert targets.decide()
        targets.prepare()
        return loader

    return load


@pytest.fixture
def wandb_offline(tmp_path, monkeypatch) -> Iterator[None]:
    """A machine that W&B does not know; its folders are this test's."""
    for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    yield
    wandb.finish()


@pytest.fixture
def copy_model(model_folder, tmp_path) -> Callable[..., Path]:
    """A function that copies the tiny model, with other values in ``config.json``."""

    def copy(name: str = "copy", **values: object) -> Path:
        folder = shutil.copytree(model_folder, tmp_path / name)
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return folder

    return copy


@pytest.fixture
def build_all() -> Callable[..., tuple[RunMetadata, ComposerBGEM3]]:
    """A function that builds the metadata and the model of a training, on its own base model."""

    def build(config: Config, base: BaseModel | None = None):
        base = base or builders.build_base_model(config)
        metadata = builders.build_metadata(config, build_plan(config), base)
        teacher = builders.build_teacher(config, base)
        return metadata, builders.build_model(config, base, metadata, teacher)

    return build


@pytest.fixture
def dense_vecs(model_folder) -> Callable[..., torch.Tensor]:
    """A function that embeds token ids with the tiny model as transformers loads it."""

    def embed(ids: torch.Tensor, mask: torch.Tensor, pooling: str = "cls") -> torch.Tensor:
        model = XLMRobertaModel.from_pretrained(model_folder).eval()
        with torch.no_grad():
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].float()
        pooled = hidden[:, 0] if pooling == "cls" else (hidden * weights).sum(1) / weights.sum(1)
        return torch.nn.functional.normalize(pooled, dim=-1)

    return embed
