"""Every key of the YAML files: its type, default, allowed values and meaning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from bge_pruning.config import names
from bge_pruning.config.data_parts import MixtureConfig, PassagesConfig
from bge_pruning.config.keys import COUNTS, SHARES, key, weight
from bge_pruning.config.keys import ConfigError as ConfigError
from bge_pruning.config.names import COLLECTIONS, L0, METHODS, MODES, OUTPUTS, SOURCE_KINDS

# OmegaConf reads the annotations at run time and knows Optional[...] best.
# ruff: noqa: RUF009, UP045  (key makes a field)

# Options of an export, one of which chooses the vocabulary.
VOCABULARY = ("keep_vocabulary_from", "languages")


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
    """Gates and their constraint. The target given last counts; no file may give two."""

    pruning_modules: list[str] = key([*names.PRUNABLE], choices=names.PRUNABLE)
    target_model: Optional[TargetModelConfig] = None
    target_parameters: Optional[float] = None  # encoder parameters, e.g. 181.4e6
    target_density: Optional[float] = key(
        None,
        bound="in (0, 1]",
        meaning="it is the share of encoder parameters to keep",
        example=0.6,
    )
    target_speedup: Optional[float] = key(
        None,
        bound="above 1",
        meaning="it says how many times fewer operations are wanted",
        example=2,
    )
    # Length of the text whose operations are counted for target_speedup.
    target_length: int = key(128, bound="above 0", meaning="it is a number of tokens", example=512)
    start_sparsity: float = key(0.0, bound="in [0, 1]")  # target sparsity at step 0
    lagrangian_warmup_steps: str = key("0.3dur", units=SHARES)  # the target is reached then
    eval_target_model: bool = True  # evaluate the final shape; false: the expected shape so far
    init_mean: float = 3.0  # log_alpha at the start: open with probability 0.99
    init_std: float = 0.25  # without spread all gates would move alike
    # Which gates start most open: random ones, or the most important ones, scored on
    # baseline.calibration_texts as by method activation or reconstruction.
    init_order: str = key("random", choices=("random", "activation", "reconstruction"))
    # Last weight, reached late, of the term that draws each gate to its side of the cut.
    binarization: float = key(100.0, bound="0 or more")


@dataclass
class BaselineConfig:
    """How a method other than ``l0`` chooses what to keep; the target is that of the gates."""

    calibration_texts: int = key(512, bound="above 0")  # training texts to measure on
    # Method layers keeps the subset with the best held-out score, or every nth layer.
    layer_choice: str = key("best", choices=("best", "every_nth"))


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
    # Default: the pooling that the base model's files name, or cls.
    pooling: Optional[str] = key(None, choices=("cls", "mean"))
    max_length: int = key(512, bound="above 0")  # tokens; longer texts are truncated
    dropout: float = key(0.0, bound="in [0, 1]")  # 0: the gates already are noise
    init_missing_heads: bool = False  # make the heads that the base model lacks
    replace_heads: bool = False  # make new heads, also where the base model has some
    # Size of a new multi-vector head; default: the hidden size, which every loader expects.
    colbert_dim: Optional[int] = key(None, bound="above 0")
    # Train the heads alone: no gradients, no optimizer state; states are computed once if they fit.
    freeze_encoder: bool = False
    freeze_embeddings: bool = False  # the tables of words, positions and types; not their LayerNorm
    activation_checkpointing: bool = False  # compute layers twice: less memory, a third more time
    compile: bool = False  # torch.compile the layers; elsewhere than on a GPU it adds padding
    l0_module: Optional[L0ModuleConfig] = None  # null: ordinary training, nothing is pruned


@dataclass
class SourceConfig:
    """One source of data."""

    name: str = "???"
    # sts: pairs; sentences: texts; contrastive, beir, mteb, parallel: queries with passages.
    kind: str = key("???", choices=SOURCE_KINDS)
    # File or pattern (texts/*.txt; of kind parallel news-{language}.txt), hf://NAME of a Hugging
    # Face dataset, BEIR folder, or mteb task. It may begin with ${oc.env:BGE_PRUNING_DATA}.
    path: str = "???"
    # Share of the batches; default: as many batches as the source has.
    weight: Optional[float] = key(None, bound="above 0")
    split: str = "train"  # of a Hugging Face dataset, a BEIR folder or an mteb task
    subset: Optional[str] = None  # configuration of a dataset, language of a task
    revision: Optional[str] = None  # of a Hugging Face dataset
    # Our column name: the file's, or several (negative_*), a part (answer.text), one of each item
    # (passages[].text), a slice (ids[1:]).
    columns: dict[str, str] = field(default_factory=dict)
    rows: Optional[int] = key(None, bound="above 0")  # of a table: the first so many
    data_files: Optional[str] = None  # pattern of files in the dataset or folder of path
    # Of hf://: draw as many rows at random as the run needs, or as rows says; download no others.
    streaming: bool = False
    # Of kind contrastive: subsets with the texts that its ids stand for, {query: x, passage: y}.
    collection: dict[str, str] = field(default_factory=dict)
    score_range: list[float] = key([0.0, 5.0])  # of kind sts
    # Of kind parallel: [de, en] (queries, passages), pairs [de-en, ar-th], or more, each to each.
    languages: list[str] = key([])
    # Of each text file, a slice as in Python: ":-400": all lines but the last 400.
    lines: Optional[str] = None
    negatives: Optional[int] = key(None, bound="0 or more")  # per query; default: data.negatives
    # false: only those negatives, not the other passages of the batch (no_in_batch_neg elsewhere).
    in_batch_negatives: bool = True
    # Texts per query that are nearest to the unpruned model and not positive.
    mined_negatives: int = key(0, bound="0 or more")
    # So many of a query that has no other negative: a positive with words deleted or swapped.
    perturbed_negatives: int = key(0, bound="0 or more")
    replaced_tokens: float = key(0.0, bound="in [0, 1]")  # of kind sentences: up to so many random
    passages: Optional[PassagesConfig] = None  # of kind sentences: cut its articles, title first
    # A text that scores above this share of the positive's score is not mined.
    mining_margin: float = key(0.95, bound="in (0, 1]")
    # What is written before its texts, or its queries; or e.g. {query: "q: ", passage: "p: "}.
    # Default: what config_sentence_transformers.json of the model says. A row's own goes first.
    prompt: Any = None
    role: Optional[str] = key(None, choices=names.ROLES[:2])  # what plain texts are to prompts

    @property
    def place(self) -> str:
        """Its path, with the folder of the data that the environment names."""
        path = names.data_path(self.path)
        inside = self.data_files and not path.startswith(names.HUB)
        return f"{path.rstrip('/')}/{self.data_files}" if inside else path

    @property
    def is_collection(self) -> bool:
        """Whether it is a retrieval collection, which is evaluated by searching it."""
        return self.kind in COLLECTIONS

    @property
    def has_passages(self) -> bool:
        """Whether a row is a query with passages."""
        return self.kind in names.WITH_PASSAGES

    @property
    def roles(self) -> tuple[str, ...]:
        """What its texts are to a model that has prompts, in the order of a row."""
        return names.ROLES[:2] if self.has_passages else (self.role or names.ROLES[2],)

    @property
    def prompts(self) -> dict[str, str]:
        """The prompts that it gives, by role."""
        if isinstance(self.prompt, dict):
            return self.prompt
        return {} if self.prompt is None else {self.roles[0]: self.prompt}


@dataclass
class DataConfig:
    """Training and evaluation data."""

    train: list[SourceConfig] = field(default_factory=list)
    eval: list[SourceConfig] = field(default_factory=list)  # of kinds sts, beir, mteb, parallel
    stages: list[MixtureConfig] = key([])  # one after the other; default: one mixture for the run
    # Given or mined negatives per query, in addition to the other passages of the batch.
    negatives: int = key(0, bound="0 or more")
    on_bad_row: str = key("error", choices=("error", "skip"))  # skip: count and report it
    # A query or pair to evaluate whose texts are trained on: refuse it, or count it and go on.
    on_trained_eval: str = key("error", choices=("error", "warn"))
    group_by_length: bool = True  # batches of texts of similar length: less padding
    adapt_weights_interval: Optional[str] = key(None, units=SHARES)  # null: the weights stay
    adapt_batches: int = key(4, bound="above 0")  # of each source, on which its loss is measured
    # Texts are tokenised once, before training: workers have little to do.
    num_workers: int = key(0, bound="0 or more")
    processed_folder: str = "data/processed"  # tokenised texts, teacher outputs, mined negatives

    def negatives_of(self, source: SourceConfig) -> int:
        """Given or mined negatives per query of a source."""
        return self.negatives if source.negatives is None else source.negatives


@dataclass
class LossConfig:
    """Weights of the parts of the loss; 0 leaves a part out."""

    sts_regression: float = weight()  # scored pairs: squared error of the cosine
    cosent: float = weight()  # scored pairs: order of the cosines
    distillation_alignment: float = weight()  # dense vectors of the unpruned model
    distillation_similarity: float = weight()  # its similarities of the texts of a batch
    distillation_sparse: float = weight()  # its sparse token weights
    distillation_colbert: float = weight()  # its multi-vectors, token by token
    distillation_hidden: float = weight()  # its hidden states, at the layers after the kept ones
    distillation_scores: float = weight()  # its scores of a query's passages, positive, negatives
    contrastive: float = weight()  # queries with passages: InfoNCE of contrastive_outputs
    self_distillation: float = weight()  # the ensemble of the outputs teaches each of them
    score_distillation: float = weight()  # the scores that the rows give their passages
    contrastive_outputs: list[str] = key([*OUTPUTS], choices=OUTPUTS)
    temperature: float = key(0.02, bound="above 0")  # of contrastive and self_distillation
    learn_temperature: bool = False  # start at temperature, stay between 0.005 and 1
    similarity_temperature: float = key(0.05, bound="above 0")
    # Of distillation_scores: in standard deviations of the unpruned model's scores of a query.
    teacher_score_temperature: float = key(0.5, bound="above 0")
    teacher_scores_in_batch: bool = False  # compare the passages of the whole batch

    @property
    def distils(self) -> bool:
        """Whether any part needs the teacher's outputs."""
        return any(v for name, v in vars(self).items() if name.startswith("distillation_"))

    @property
    def compares_texts(self) -> bool:
        """Whether any part compares the texts of a batch, so that the batch may not be split."""
        in_batch = self.distillation_scores if self.teacher_scores_in_batch else 0.0
        parts = (self.cosent, self.distillation_similarity, self.contrastive, in_batch)
        return any(parts) or self.self_distillation > 0


@dataclass
class TeacherConfig:
    """The model to distil from."""

    base_model: Optional[str] = None  # default: model.base_model, unpruned
    # true: embed the texts that the run draws once, before it; false: run the teacher in every
    # step; auto: what costs less, as the log says.
    cache: bool | str = key("auto", choices=("auto", True, False))
    # Before a recovery, fit each layer's output to the uncut model's on so many training texts.
    refit_texts: int = key(0, bound="0 or more")


@dataclass
class EvaluationConfig:
    """How data.eval is evaluated, every eval_interval and at the last batch."""

    # How collections (kinds beir and mteb) are searched: dense, sparse, colbert, dense+sparse, all.
    modes: list[str] = key(["dense"], choices=tuple(MODES))
    keep_best: Optional[str] = None  # score whose best checkpoint is kept, e.g. scifact/ndcg_at_10
    # Tokens of a collection's texts; default: model.max_length.
    max_length: Optional[int] = key(None, bound="above 0")


@dataclass
class ExportConfig:
    """How the pipeline writes the finished model; the options of extract_pruned_model.py."""

    dtype: str = key("fp32", choices=("fp32", "fp16", "bf16"))  # of the weights on disk
    # Size of a multi-vector: keep, or hidden: same scores, FlagEmbedding needs no colbert_dim.
    colbert_dim: str = key("keep", choices=("keep", "hidden"))
    keep_dimension: bool = False  # dense vectors in the source's dimensions, for an existing index
    # Files to fit the map to these dimensions on.
    fit_texts: list[str] = key([], needs=("keep_dimension",))
    keep_vocabulary_from: list[str] = key([])  # files whose tokens are kept
    languages: list[str] = key([])  # languages whose tokens in the shipped sentences are kept
    # Keep so many of these tokens, the most frequent ones.
    vocabulary_size: Optional[int] = key(None, bound="above 0", needs=VOCABULARY)
    report_on: list[str] = key([], needs=VOCABULARY)  # files whose lost tokens the card reports
    onnx: bool = False  # write onnx/model.onnx
    onnx_int8: bool = False  # write onnx/model_quantized.onnx too
    # Scored pairs on which the loss of int8 is measured.
    int8_sts: Optional[str] = key(None, needs=("onnx_int8",))
    # Write it even if the mean cosine of an output to float32 is below 0.95.
    int8_any_loss: bool = key(False, needs=("onnx_int8",))


@dataclass
class OptimizerConfig:
    """AdamW with three learning rates."""

    lr: float = key(1e-4, bound="0 or more")  # weights
    weight_decay: float = key(0.01, bound="0 or more")  # matrices only
    betas: list[float] = key([0.9, 0.98])
    eps: float = key(1e-8, bound="above 0")
    l0_lr: float = key(0.1, bound="0 or more")  # gates
    # lambda_1, by ascent; it remembers past gaps and overshoots.
    lagrangian_lr: float = key(0.02, bound="0 or more")
    # lambda_2, by ascent; it answers the present gap and damps.
    lambda_2_lr: float = key(1.0, bound="0 or more")
    max_grad_norm: float = key(1.0, bound="0 or more")  # per group; 0 switches clipping off
    # At a loss or gradient that is not finite: stop, or skip the step (10 in a row stop the run).
    non_finite: str = key("stop", choices=("stop", "skip"))


@dataclass
class SchedulerConfig:
    """Learning-rate schedule of all groups."""

    name: str = key("linear", choices=("linear", "cosine", "constant"))  # after the warm-up
    t_warmup: str = key("0.05dur", units=SHARES)  # Composer time string
    alpha_f: float = key(0.1, bound="in [0, 1]")  # last learning rate as a share of the first


@dataclass
class ParallelismConfig:
    """How the model is distributed over the ranks."""

    fsdp: bool = False  # shard the encoder's weights and their optimizer state over the ranks
    # full: a layer's weights are gathered when it runs. gradients: once a step, which is quicker
    # and takes the memory of all weights.
    sharding: str = key("full", choices=("full", "gradients"))
    # Checkpoints: full, one file; sharded, a folder that all ranks write.
    state_dict: str = key("full", choices=("full", "sharded"))


@dataclass
class WandbConfig:
    """Weights & Biases; ``mode: offline`` needs no account."""

    project: str = "bge_pruning"
    entity: Optional[str] = None
    mode: str = key("offline", choices=("offline", "online", "disabled"))


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

    extends: list[str] = key([])
    run_name: str = "bge_pruning"
    # l0 trains gates. The other methods are baselines: the model is cut at once, and recovers for
    # as many steps as l0 prunes and recovers.
    method: str = key(L0, choices=METHODS)
    # recover trains the extracted model further.
    stage: str = key("prune", choices=("prune", "recover"))
    dry_run: bool = False  # print the plan and stop
    seed: int = key(17, bound="0 or more")
    max_duration: str = key("15000ba", units=COUNTS)
    eval_interval: str = key("500ba", units=SHARES)  # and at the end, as the two below
    save_interval: str = key("500ba", units=SHARES)
    log_interval: str = key("50ba", units=COUNTS)
    global_train_batch_size: int = key(32, bound="above 0")
    # Rows at once, to save memory; default: the whole batch.
    device_train_microbatch_size: Optional[int] = key(None, bound="above 0")
    eval_batch_size: int = key(64, bound="above 0")
    # amp_bf16 needs a GPU, or a CPU with instructions for it; amp_fp16 is for an older GPU.
    precision: str = key("fp32", choices=("fp32", "amp_bf16", "amp_fp16"))
    device: Optional[str] = key(None, choices=("cpu", "gpu"))  # default: a GPU if there is one
    run_folder: str = "experiments/checkpoints/${run_name}"
    results_folder: str = "experiments/results/${run_name}"
    autoresume: bool = False  # go on with an earlier run, whatever overwrite says
    overwrite: bool = False  # replace an earlier run's folders
    # Seconds that a rank waits for the others in one step, or for a checkpoint. What else rank 0
    # does alone may take longer.
    dist_timeout: float = key(600.0, bound="above 0")
    progress_bar: bool = True
    checkpoints_to_keep: int = key(2, bound="above 0")
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
    # Keys that differ in the recovery, in the layout of this class.
    recovery: Optional[dict[str, Any]] = None
