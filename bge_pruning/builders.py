"""From the configuration to objects: the only place that knows both."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer import Evaluator, Trainer
from composer.core import Algorithm, Callback, DataSpec
from composer.loggers import FileLogger, LoggerDestination, TensorboardLogger, WandBLogger
from composer.optim import (
    ComposerScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearWithWarmupScheduler,
)
from composer.utils import dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bge_pruning.algorithms.group_gradient_clipping import GroupGradientClipping
from bge_pruning.algorithms.pruning_schedule import PruningSchedule
from bge_pruning.callbacks.metrics_file import MetricsFile
from bge_pruning.callbacks.pruning_callback import PruningCallback
from bge_pruning.callbacks.run_metadata_callback import RunMetadataCallback
from bge_pruning.config import Config, ConfigError, SourceConfig
from bge_pruning.datasets.embedding_dataset import (
    Collator,
    EmbeddingDataset,
    TokenizedTexts,
    tokenize,
)
from bge_pruning.datasets.length_grouped_sampler import LengthGroupedSampler
from bge_pruning.datasets.sts_dataloader import MAX_SCORE, read_sentences, read_sts
from bge_pruning.datasets.teacher_vectors import cached_teacher_vectors, compute_cache_key
from bge_pruning.models.checkpoint import RunMetadata, build_l0_module
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3, FrozenEncoder, LossWeights
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.model_registry import build_composer_model
from bge_pruning.models.pretrained import (
    WEIGHT_FILES,
    BaseModel,
    fetch_model_folder,
    load_base_model,
    read_hf_config,
)
from bge_pruning.plan import Plan

log = logging.getLogger(__name__)

VERSIONED = ("torch", "mosaicml", "transformers", "sentence-transformers", "tokenizers")


def build_metadata(config: Config, plan: Plan, base: BaseModel) -> RunMetadata:
    """What checkpoints carry so that extraction needs nothing else."""
    l0 = config.model.l0_module
    arguments = None
    if l0 is not None:
        arguments = {
            "axes": list(plan.axes),
            "target": None if plan.target is None else asdict(_with_outer(plan, base)),
            "target_parameters": plan.target_parameters,
            "start_sparsity": l0.start_sparsity,
            "init_mean": l0.init_mean,
            "init_std": l0.init_std,
            "seed": config.seed,
        }
    return RunMetadata(
        base_model=base.name,
        shape=asdict(base.shape),
        hf_config=base.hf_config,
        pooling=base.heads.pooling,
        max_seq_length=base.max_seq_length,
        seed=config.seed,
        l0_module=arguments,
        source_pruning=base.pruning,
        versions=package_versions(),
        tokenizer_files=base.tokenizer_files,
    )


def _with_outer(plan: Plan, base: BaseModel) -> EncoderShape:
    """The target shape with the outer parts that the loaded weights really have."""
    s = base.shape
    return replace(
        plan.target, pooler=s.pooler, sparse_head=s.sparse_head, colbert_dim=s.colbert_dim
    )


def package_versions() -> dict[str, str]:
    """Versions that results depend on."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in VERSIONED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def build_base_model(config: Config) -> BaseModel:
    """The model that training starts from."""
    m = config.model
    return load_base_model(m.base_model, m.revision, m.pooling, m.dropout, m.init_missing_heads)


class Teacher:
    """The model to distil from, loaded only when its vectors are not cached.

    Args:
        config: The run.
        base: The model that training starts from.
    """

    def __init__(self, config: Config, base: BaseModel) -> None:
        source = base.pruning["source"]["base_model"] if base.pruning else config.model.base_model
        self.name = config.teacher.base_model or source
        same = self.name == config.model.base_model
        self.revision = config.model.revision if same else None
        self.pooling = base.heads.pooling
        self._encoder: FrozenEncoder | None = None

    def encoder(self) -> FrozenEncoder:
        """The frozen model."""
        if self._encoder is None:
            model = load_base_model(self.name, self.revision, self.pooling)
            self._encoder = FrozenEncoder(model.backbone, model.heads)
        return self._encoder

    def hidden_size(self) -> int:
        """Size of its vectors."""
        return read_hf_config(fetch_model_folder(self.name, self.revision))["hidden_size"]

    def fingerprint(self) -> str:
        """Hash of its weights, and its pooling."""
        folder = fetch_model_folder(self.name, self.revision)
        weights = next(folder / file for file in WEIGHT_FILES if (folder / file).is_file())
        digest = hashlib.sha256(self.pooling.encode())
        with weights.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
        return digest.hexdigest()


def build_teacher(config: Config, base: BaseModel) -> Teacher | None:
    """The teacher, if the loss distils."""
    return Teacher(config, base) if _loss_weights(config).distils else None


def _loss_weights(config: Config) -> LossWeights:
    return LossWeights(**vars(config.loss))


def build_model(
    config: Config, base: BaseModel, metadata: RunMetadata, teacher: Teacher | None
) -> ComposerBGEM3:
    """The model to train."""
    on_the_fly = teacher is not None and not config.teacher.cache
    l0 = config.model.l0_module
    return build_composer_model(
        config.model.name,
        backbone=base.backbone,
        heads=base.heads,
        l0_module=build_l0_module(base.shape, metadata.l0_module),
        loss_weights=_loss_weights(config),
        teacher=teacher.encoder() if on_the_fly else None,
        teacher_dimensions=_teacher_dimensions(base, teacher),
        eval_target_model=True if l0 is None else l0.eval_target_model,
    )


def _teacher_dimensions(base: BaseModel, teacher: Teacher | None) -> Tensor | None:
    if teacher is None or teacher.hidden_size() == base.shape.hidden_size:
        return None
    kept = (base.pruning or {}).get("kept", {}).get("hidden", [])
    if len(kept) != base.shape.hidden_size:
        raise ConfigError(
            f"teacher '{teacher.name}' has {teacher.hidden_size()} dimensions, {base.name} "
            f"{base.shape.hidden_size}, and no pruning.json says which they are. To fix, distil "
            f"from the model that it was cut from, or set loss.distillation_alignment=0."
        )
    return torch.tensor(kept)


# Data


def check_objective(config: Config) -> None:
    """Refuse losses and data that do not fit each other.

    Raises:
        ConfigError: If nothing is optimised, data is missing or of the wrong kind, or a loss over
            the batch would change because the batch is split.
    """
    weights, kinds = _loss_weights(config), {source.kind for source in config.data.train}
    if not config.data.train:
        raise ConfigError("data.train is empty. To fix, add configs/training/sts_only.yaml.")
    unsupported = kinds - {"sts", "sentences"}
    if unsupported:
        raise ConfigError(
            f"data of kind {', '.join(sorted(unsupported))} cannot be trained on in this version. "
            f"To fix, use kind sts or sentences."
        )
    if len(kinds) > 1:
        raise ConfigError(
            "data.train mixes kinds sts and sentences, which this version cannot. To fix, use "
            "kind sentences for all (scores are then not read)."
        )
    if not (weights.sts_regression or weights.distils):
        raise ConfigError("all weights under loss are 0. To fix, set e.g. loss.sts_regression=1.")
    if weights.sts_regression and kinds != {"sts"}:
        raise ConfigError(
            "loss.sts_regression needs data.train of kind sts. To fix, set it to 0 or add scores."
        )
    micro = config.device_train_microbatch_size
    per_device = config.global_train_batch_size // dist.get_world_size()
    if micro is not None and micro < per_device and weights.distillation_similarity:
        raise ConfigError(
            f"device_train_microbatch_size {micro} splits the batch of {per_device}, and "
            f"loss.distillation_similarity compares all texts of a batch: it would silently become "
            f"another loss. To fix, leave device_train_microbatch_size out, or set "
            f"loss.distillation_similarity=0."
        )


def build_train_loader(config: Config, base: BaseModel, teacher: Teacher | None) -> DataSpec:
    """Training batches of this rank."""
    dataset = _build_dataset(config.data.train, config, base)
    if teacher is not None and config.teacher.cache:
        dataset.teacher_dense_vecs = _teacher_vectors(config, base, teacher, dataset.texts)
    ranks = dist.get_world_size()
    sampler = LengthGroupedSampler(
        dataset,
        dataset.lengths,
        config.global_train_batch_size,
        num_replicas=ranks,
        rank=dist.get_global_rank(),
        seed=config.seed,
    )
    return _data_spec(
        dataset,
        batch_size=config.global_train_batch_size // ranks,
        sampler=sampler,
        drop_last=True,
        collate_fn=Collator(base.hf_config["pad_token_id"]),
        num_workers=config.data.num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def _data_spec(dataset: EmbeddingDataset, **arguments: Any) -> DataSpec:
    return DataSpec(DataLoader(dataset, **arguments), split_batch=_split_batch)


def _split_batch(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    # Composer's own splitting warns at every last batch that is smaller than the others.
    starts = range(0, len(batch["input_ids"]), size)
    return [{key: value[i : i + size] for key, value in batch.items()} for i in starts]


def build_evaluators(config: Config, base: BaseModel) -> list[Evaluator]:
    """One evaluator per held-out file of scored pairs."""
    evaluators = []
    for source in config.data.eval:
        if source.kind != "sts":
            raise ConfigError(
                f"data.eval '{source.name}' is of kind {source.kind}; only kind sts is evaluated "
                f"during training in this version. To fix, remove it."
            )
        dataset = _build_dataset([source], config, base)
        # Pairs of similar length together: less padding, and the metric does not see the order.
        order = np.argsort(dataset.lengths, kind="stable")
        dataset = EmbeddingDataset(dataset.texts, dataset.examples[order], dataset.scores[order])
        loader = _data_spec(
            dataset,
            batch_size=config.eval_batch_size,
            sampler=dist.get_sampler(dataset, shuffle=False),
            collate_fn=Collator(base.hf_config["pad_token_id"]),
        )
        evaluators.append(
            Evaluator(label=source.name, dataloader=loader, metric_names=["cosine_spearman"])
        )
    return evaluators


def _build_dataset(
    sources: list[SourceConfig], config: Config, base: BaseModel
) -> EmbeddingDataset:
    """All files of one kind, tokenised."""
    scored = sources[0].kind == "sts"
    texts: list[str] = []
    scores: list[float] = []
    for source in sources:
        if scored:
            pairs = read_sts(source.path)
            rows = zip(pairs.sentences1, pairs.sentences2, strict=True)
            texts += [text for pair in rows for text in pair]
            scores += [score / MAX_SCORE for score in pairs.scores]
        else:
            texts += read_sentences(source.path)
    if not scored:
        texts = list(dict.fromkeys(texts))
    max_length = min(config.model.max_length, base.max_seq_length)
    tokens = tokenize(texts, base.tokenizer_files["tokenizer.json"], max_length)
    if tokens.truncated:
        log.info("%d of %d texts cut at %d tokens", tokens.truncated, len(tokens), max_length)
    examples = np.arange(len(texts)).reshape(-1, 2 if scored else 1)
    return EmbeddingDataset(tokens, examples, np.array(scores, np.float32) if scored else None)


def _teacher_vectors(
    config: Config, base: BaseModel, teacher: Teacher, texts: TokenizedTexts
) -> np.ndarray:
    key = compute_cache_key(texts, teacher.fingerprint())
    path = Path(config.data.processed_folder) / f"teacher-{key}.npy"

    def encode(ids: Tensor, mask: Tensor) -> Tensor:
        return teacher.encoder()(ids.to(_device_name(config)), mask.to(_device_name(config)))

    # The other ranks find the file that the first one wrote.
    with _rank_zero_first():
        return cached_teacher_vectors(texts, encode, base.hf_config["pad_token_id"], path)


def _device_name(config: Config) -> str:
    gpu = config.device == "gpu" or (config.device is None and torch.cuda.is_available())
    return "cuda" if gpu else "cpu"


@contextmanager
def _rank_zero_first() -> Iterator[None]:
    if dist.get_local_rank() != 0:
        dist.barrier()
    yield
    if dist.get_local_rank() == 0:
        dist.barrier()


# Optimisation


def build_optimizer(config: Config, model: ComposerBGEM3) -> torch.optim.AdamW:
    """AdamW with groups for weights, gates and multipliers; the multipliers ascend."""
    o = config.optimizer
    groups = weight_groups(model.backbone, o.lr, o.weight_decay)
    if model.l0_module is not None:
        groups += l0_groups(model.l0_module, o.l0_lr, o.lagrangian_lr)
    return torch.optim.AdamW(groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps, fused=True)


def weight_groups(backbone: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; biases, LayerNorms and embeddings without.

    Decay on the embeddings would shrink the rows of tokens that the data does not contain.
    """
    decay, rest = [], []
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and not name.startswith("embeddings.")
            (decay if matrix else rest).append(parameter)
    return [
        {"name": "weights/decay", "params": decay, "lr": lr, "weight_decay": weight_decay},
        {"name": "weights/no_decay", "params": rest, "lr": lr, "weight_decay": 0.0},
    ]


def l0_groups(l0_module: L0Module, l0_lr: float, lagrangian_lr: float) -> list[dict[str, Any]]:
    """Gates by descent, multipliers by ascent, both without decay."""
    multipliers = [*l0_module.lambda_1.parameters(), *l0_module.lambda_2.parameters()]
    return [
        {
            "name": "gates",
            "params": list(l0_module.log_alpha.parameters()),
            "lr": l0_lr,
            "weight_decay": 0.0,
        },
        {
            "name": "multipliers",
            "params": multipliers,
            "lr": lagrangian_lr,
            "weight_decay": 0.0,
            "maximize": True,
        },
    ]


def build_scheduler(config: Config) -> ComposerScheduler:
    """Learning-rate schedule; a factor of at least 0 for all groups, so no sign flips."""
    s = config.scheduler
    if s.name == "constant":
        return ConstantWithWarmupScheduler(t_warmup=s.t_warmup)
    kinds = {
        "linear": LinearWithWarmupScheduler,
        "cosine": CosineAnnealingWithWarmupScheduler,
    }
    return kinds[s.name](t_warmup=s.t_warmup, alpha_f=s.alpha_f)


def build_algorithms(config: Config, model: ComposerBGEM3) -> list[Algorithm]:
    """What changes training."""
    algorithms: list[Algorithm] = []
    if model.l0_module is not None:
        warmup = config.model.l0_module.lagrangian_warmup_steps
        algorithms.append(PruningSchedule(model.l0_module, warmup))
    if config.optimizer.max_grad_norm > 0:
        algorithms.append(GroupGradientClipping(config.optimizer.max_grad_norm))
    return algorithms


def build_callbacks(config: Config, model: ComposerBGEM3, metadata: RunMetadata) -> list[Callback]:
    """What watches training."""
    return [
        RunMetadataCallback(metadata),
        PruningCallback(model.l0_module, config.log_interval),
    ]


def build_loggers(config: Config) -> list[LoggerDestination]:
    """Where metrics go."""
    loggers: list[LoggerDestination] = [MetricsFile(Path(config.run_folder) / "metrics.jsonl")]
    folder = Path(config.loggers.folder) / config.run_name
    if config.loggers.wandb is not None:
        w = config.loggers.wandb
        folder.mkdir(parents=True, exist_ok=True)
        init = {"mode": w.mode, "dir": str(folder)}
        loggers.append(
            WandBLogger(project=w.project, entity=w.entity, name=config.run_name, init_kwargs=init)
        )
    if config.loggers.tensorboard:
        loggers.append(TensorboardLogger(log_dir=str(folder)))
    if config.loggers.file:
        name = str(folder / f"{config.stage}-rank{{rank}}.txt")
        loggers.append(FileLogger(filename=name, overwrite=True))
    return loggers


def build_trainer(
    config: Config,
    model: ComposerBGEM3,
    metadata: RunMetadata,
    train_loader: DataSpec,
    evaluators: list[Evaluator],
) -> Trainer:
    """The Composer Trainer of a run."""
    return Trainer(
        model=model,
        train_dataloader=train_loader,
        eval_dataloader=evaluators,
        eval_interval=config.eval_interval,
        max_duration=config.max_duration,
        optimizers=build_optimizer(config, model),
        schedulers=build_scheduler(config),
        step_schedulers_every_batch=True,
        algorithms=build_algorithms(config, model),
        callbacks=build_callbacks(config, model, metadata),
        loggers=build_loggers(config),
        progress_bar=config.progress_bar and sys.stderr.isatty(),
        run_name=Path(config.run_folder).name,
        save_folder=config.run_folder,
        save_filename="ba{batch}-rank{rank}.pt",
        save_interval=config.save_interval,
        save_num_checkpoints_to_keep=config.checkpoints_to_keep,
        autoresume=config.autoresume,
        seed=config.seed,
        precision=config.precision,
        device=config.device,
        device_train_microbatch_size=config.device_train_microbatch_size,
    )
