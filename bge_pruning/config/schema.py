"""Every key of the YAML files: its default, its reason and its range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

# OmegaConf reads the annotations at run time and knows Optional[...] best.
# ruff: noqa: UP045

# How it is decided what stays: by learned gates, or by one of the baselines.
L0 = "l0"
METHODS = (L0, "layers", "magnitude", "activation", "reconstruction", "random")
SOURCE_KINDS = ("sts", "sentences", "contrastive", "beir", "mteb")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what, where and how to fix it."""

    exit_code = 2  # of a command, as for a wrong argument


@dataclass
class TargetModelConfig:
    """Sizes to reach; a size that is left out stays as it is."""

    d_model: Optional[int] = None
    n_heads: Optional[int] = None
    n_layers: Optional[int] = None
    intermediate_size: Optional[int] = None
    vocab_size: Optional[int] = None


@dataclass
class L0ModuleConfig:
    """Gates and their constraint. Give one target: a model, parameters, a density, a speed-up."""

    pruning_modules: list[str] = field(
        default_factory=lambda: ["head", "intermediate", "layer", "hidden"]
    )
    target_model: Optional[TargetModelConfig] = None
    target_parameters: Optional[float] = None  # encoder parameters, e.g. 181.4e6
    target_density: Optional[float] = None  # share of the encoder's parameters to keep, (0, 1]
    target_speedup: Optional[float] = None  # how many times fewer operations, above 1
    target_length: int = 128  # tokens of the text whose operations are counted for it
    start_sparsity: float = 0.0  # target sparsity at step 0
    lagrangian_warmup_steps: str = "0.3dur"  # Composer time string: the target is reached here
    eval_target_model: bool = True  # evaluate the final shape; false: the expected shape so far
    init_mean: float = 3.0  # log_alpha at the start: open with probability 0.99
    init_std: float = 0.25  # without spread all gates would move alike
    # Which of them start most open: random, or the most important on baseline.calibration_texts,
    # as method activation or reconstruction scores it.
    init_order: str = "random"
    # What draws each gate to its side of the cut: its last weight, to which it grows late.
    binarization: float = 100.0


@dataclass
class BaselineConfig:
    """How a method other than ``l0`` chooses what stays; its target is that of the gates."""

    calibration_texts: int = 512  # of the training data: what activations are measured on
    # Of method layers: best, the subset with the best held-out score, or every_nth.
    layer_choice: str = "best"


@dataclass
class ModelConfig:
    """The model to prune. Sizes are read from the checkpoint; those given here must agree."""

    name: str = "composer_bge_m3"
    base_model: str = "BAAI/bge-m3"  # hub name or folder
    revision: Optional[str] = None  # hub revision
    d_model: Optional[int] = None
    n_heads: Optional[int] = None
    n_layers: Optional[int] = None
    intermediate_size: Optional[int] = None
    vocab_size: Optional[int] = None
    pooling: Optional[str] = None  # cls or mean; default: what the base model's files say, or cls
    max_length: int = 512  # tokens; longer texts are truncated
    dropout: float = 0.0  # 0: the gates already are noise
    init_missing_heads: bool = False  # make sparse and multi-vector heads a base model lacks
    freeze_embeddings: bool = False  # no gradients and optimizer state for them: less memory
    activation_checkpointing: bool = False  # compute layers twice: less memory, a third more time
    compile: bool = False  # torch.compile the layers, for a GPU; elsewhere padding is computed too
    l0_module: Optional[L0ModuleConfig] = None  # null: ordinary training, nothing is pruned


@dataclass
class SourceConfig:
    """One source of data."""

    name: str = "???"
    kind: str = "???"  # sts: pairs; sentences: text; contrastive, beir, mteb: queries with passages
    # File or pattern (texts/*.txt), hf://NAME of a Hugging Face dataset, BEIR folder, or mteb task.
    path: str = "???"
    weight: Optional[float] = None  # share of the batches; default: as many as it has
    split: str = "train"  # of a Hugging Face dataset, a BEIR folder or an mteb task
    subset: Optional[str] = None  # configuration of a dataset, language of a task
    revision: Optional[str] = None  # of a Hugging Face dataset
    columns: dict[str, str] = field(default_factory=dict)  # our column name: the file's
    score_range: list[float] = field(default_factory=lambda: [0.0, 5.0])  # of kind sts
    negatives: Optional[int] = None  # per query; default: data.negatives
    mined_negatives: int = 0  # per query: nearest to the unpruned model that are no positive
    # Of kind sentences: random other tokens for up to this share of a text's, so that a student is
    # taught words that few texts have.
    replaced_tokens: float = 0.0
    mining_margin: float = 0.95  # not those that score above this share of the positive's score


@dataclass
class DataConfig:
    """Training and evaluation data."""

    train: list[SourceConfig] = field(default_factory=list)
    eval: list[SourceConfig] = field(default_factory=list)  # of kinds sts, beir and mteb
    negatives: int = 0  # given or mined ones, per query; those of the batch are there anyway
    on_bad_row: str = "error"  # stop before training, or skip: count and report
    group_by_length: bool = True  # batches of texts of similar length: less padding
    adapt_weights_interval: Optional[str] = None  # time; null: the weights stay
    adapt_batches: int = 4  # of each source, on which its loss is measured
    num_workers: int = 0  # texts are tokenised once, before training: workers have little to do
    processed_folder: str = "data/processed"  # tokenised texts, teacher outputs, mined negatives


@dataclass
class LossConfig:
    """Weights of the parts of the loss; 0 leaves a part out."""

    sts_regression: float = 0.0  # scored pairs: squared error of the cosine
    cosent: float = 0.0  # scored pairs: order of the cosines
    distillation_alignment: float = 0.0  # dense vectors of the unpruned model
    distillation_similarity: float = 0.0  # its similarities of the texts of a batch
    distillation_sparse: float = 0.0  # its sparse token weights
    distillation_colbert: float = 0.0  # its multi-vectors, token by token
    distillation_hidden: float = 0.0  # its hidden states, at the layers that follow the survivors
    contrastive: float = 0.0  # queries with passages: InfoNCE of contrastive_outputs
    self_distillation: float = 0.0  # the ensemble of the outputs teaches each of them
    score_distillation: float = 0.0  # scores that the rows give their passages
    contrastive_outputs: list[str] = field(default_factory=lambda: ["dense", "sparse", "colbert"])
    temperature: float = 0.02  # of contrastive and self_distillation
    learn_temperature: bool = False  # start at temperature, stay between 0.005 and 1
    similarity_temperature: float = 0.05


@dataclass
class TeacherConfig:
    """The model to distil from."""

    base_model: Optional[str] = None  # default: model.base_model, unpruned
    cache: bool = True  # embed the training texts once; false: run the teacher in every step
    # Before a recovery, fit each layer's output to the uncut model's on so many training texts.
    refit_texts: int = 0


@dataclass
class EvaluationConfig:
    """How data.eval is evaluated, every eval_interval and at the last batch."""

    # How collections (kinds beir and mteb) are searched: dense, sparse, colbert, dense+sparse, all.
    modes: list[str] = field(default_factory=lambda: ["dense"])
    keep_best: Optional[str] = None  # score whose best checkpoint is kept, e.g. scifact/ndcg_at_10
    max_length: Optional[int] = None  # tokens of a collection's texts; default: model.max_length


@dataclass
class ExportConfig:
    """What the pipeline's finished model is written as; the options of extract_pruned_model.py."""

    dtype: str = "fp32"  # of the weights on disk: fp32, fp16, bf16
    # Size of a multi-vector: keep, or hidden: same scores, FlagEmbedding needs no colbert_dim.
    colbert_dim: str = "keep"
    keep_dimension: bool = False  # dense vectors in the source's dimensions, for an existing index
    fit_texts: list[str] = field(default_factory=list)  # files to fit that map on
    keep_vocabulary_from: list[str] = field(default_factory=list)  # files whose tokens are kept
    languages: list[str] = field(default_factory=list)  # and those of the sentences shipped
    vocabulary_size: Optional[int] = None  # of them, the most frequent
    report_on: list[str] = field(default_factory=list)  # files: what they lose is in the card
    onnx: bool = False  # onnx/model.onnx
    onnx_int8: bool = False  # and onnx/model_quantized.onnx
    int8_sts: Optional[str] = None  # scored pairs to measure its loss on


# An option, and the options of which it needs one.
EXPORT_NEEDS = {
    "fit_texts": ("keep_dimension",),
    "int8_sts": ("onnx_int8",),
    "vocabulary_size": ("keep_vocabulary_from", "languages"),
    "report_on": ("keep_vocabulary_from", "languages"),
}


def missing_export_options(given: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Options of an export that need another one which is not there, with what they need.

    Args:
        given: Values of :class:`ExportConfig` by name.
    """
    return {
        option: needed
        for option, needed in EXPORT_NEEDS.items()
        if given[option] and not any(given[name] for name in needed)
    }


@dataclass
class OptimizerConfig:
    """AdamW with three learning rates."""

    lr: float = 1e-4  # weights
    weight_decay: float = 0.01  # matrices only
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-8
    l0_lr: float = 0.1  # gates
    lagrangian_lr: float = 0.02  # lambda_1, by ascent; it remembers past gaps and overshoots
    lambda_2_lr: float = 1.0  # lambda_2, by ascent; it answers the present gap and damps
    max_grad_norm: float = 1.0  # per group; 0 switches clipping off
    # At a loss or gradient that is no number: stop, or skip the step (10 in a row stop the run).
    non_finite: str = "stop"


@dataclass
class SchedulerConfig:
    """Learning-rate schedule of all groups."""

    name: str = "linear"  # linear, cosine or constant, after the warm-up
    t_warmup: str = "0.05dur"  # Composer time string
    alpha_f: float = 0.1  # last learning rate as a share of the first


@dataclass
class ParallelismConfig:
    """How the model lies on many ranks."""

    fsdp: bool = False  # share the encoder's weights and their optimizer state out over the ranks
    # full: a layer's weights are gathered when it is their turn. gradients: once a step, which is
    # quicker and takes the memory of all weights.
    sharding: str = "full"
    state_dict: str = "full"  # checkpoints: full, one file; sharded, a folder that all ranks write


@dataclass
class WandbConfig:
    """Weights & Biases; ``mode: offline`` needs no account."""

    project: str = "bge_pruning"
    entity: Optional[str] = None
    mode: str = "offline"


@dataclass
class LoggersConfig:
    """Where metrics go besides the console and the run's metrics.jsonl."""

    wandb: Optional[WandbConfig] = None
    tensorboard: bool = False
    file: bool = False
    folder: str = "experiments/logs"


@dataclass
class Config:
    """A run."""

    extends: list[str] = field(default_factory=list)
    run_name: str = "bge_pruning"
    # l0: gates are trained. The others are baselines, which are cut at once and recover for as many
    # steps as l0 prunes and recovers.
    method: str = L0
    stage: str = "prune"  # prune, or recover: train the extracted model on
    dry_run: bool = False  # print the plan and stop
    seed: int = 17
    max_duration: str = "15000ba"
    eval_interval: str = "500ba"
    save_interval: str = "500ba"
    log_interval: str = "50ba"
    global_train_batch_size: int = 32
    device_train_microbatch_size: Optional[int] = None  # less memory; default: the whole batch
    eval_batch_size: int = 64
    # fp32; amp_bf16 on a GPU or a CPU with instructions for it; amp_fp16 on an older GPU.
    precision: str = "fp32"
    device: Optional[str] = None  # cpu or gpu; default: a GPU if there is one
    run_folder: str = "experiments/checkpoints/${run_name}"
    results_folder: str = "experiments/results/${run_name}"
    autoresume: bool = False
    overwrite: bool = False  # replace an earlier run's folders
    # Seconds that a rank waits for the others in one step; they never wait for rank 0's caches.
    dist_timeout: float = 600.0
    progress_bar: bool = True
    checkpoints_to_keep: int = 2
    model: ModelConfig = field(default_factory=ModelConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    loggers: LoggersConfig = field(default_factory=LoggersConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    # Keys that differ while the extracted model is trained on, in the layout of this class.
    recovery: Optional[dict[str, Any]] = None
