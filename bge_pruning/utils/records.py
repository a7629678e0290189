"""The records of ``evaluation.json``, ``pruning.json`` and ``run.json``, in this order."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from bge_pruning.utils.json_records import (
    Count,
    Depth,
    Flag,
    Interval,
    Number,
    Positive,
    Record,
    Size,
    Text,
    one_of,
)

MODES = ("dense", "sparse", "colbert", "dense+sparse", "all")
# How people write the metrics that mteb computes.
METRIC_TITLES = {
    "cosine_spearman": "Spearman",
    "cosine_pearson": "Pearson",
    "spearman": "Spearman",
    "pearson": "Pearson",
    "ndcg_at_10": "nDCG@10",
    "mrr_at_10": "MRR@10",
    "recall_at_100": "Recall@100",
    "map_at_100": "MAP@100",
}
PLAIN, GATES, COMPILED, TEACHER, CACHED = "plain", "gates", "compiled", "teacher", "cached"
WHOLE, FROZEN = "whole", "frozen"
TRAININGS = {  # in this order
    PLAIN: "plain fine-tuning",
    GATES: "gates",
    COMPILED: "gates, compiled",
    TEACHER: "gates, teacher on the fly",
    CACHED: "gates, cached teacher",
    WHOLE: "gates, all rows of the words",
    FROZEN: "gates, frozen embeddings",
}

Mode = Annotated[str, one_of(MODES)]
Metric = Annotated[str, one_of(tuple(METRIC_TITLES))]
TaskKind = Annotated[str, one_of(("similarity", "retrieval"))]
Pooling = Annotated[str, one_of(("cls", "mean"))]


class Parameters(Record):
    """Parameters of a model by part."""

    encoder: Positive
    embeddings: Count = 0
    pooler: Count = 0
    heads: Count = 0
    total: Positive


class Entry(Record):
    """One metric of a task in a mode, see :func:`bge_pruning.evaluation.evaluate.describe_task`."""

    task: Text
    kind: TaskKind | None = None
    mode: Mode
    metric: Metric | None = None
    main: Flag
    value: Number
    baseline: Number | None
    floor: Number
    floors: dict[str, Number] = Field(default_factory=dict)
    retention: Number | None
    retention_above_floor: Number | None = None
    also: dict[str, Number | None] = Field(default_factory=dict)
    samples: Count | None = None
    texts: Count | None = None
    truncated: Count | None = None
    seconds: Number | None = None
    interval: Interval | None = None
    p_value: Number | None = None


class Times(Record):
    """Milliseconds of one text."""

    median: Positive
    p95: Positive | None = None


class Latency(Record):
    """Latency of two models."""

    model: Times | None = None
    baseline: Times | None = None
    ratio: Positive
    ratio_iqr: Interval | None = None


class Throughput(Record):
    """Texts per second of two models."""

    model: Positive | None = None
    baseline: Positive | None = None
    ratio: Positive
    ratio_iqr: Interval | None = None


class Memory(Record):
    """Bytes of ``weights`` and ``activations`` while a batch is embedded."""

    texts: Count
    tokens: Count
    model: dict[str, Count | None]
    baseline: dict[str, Count | None]


class Speed(Record):
    """Speed of two models that took turns."""

    device: Text | None = None
    threads: Count | None = None
    batch_size: Count = 32
    load: Text = ""
    latency_ms: Latency
    throughput_texts_per_s: Throughput
    memory_bytes: Memory | None = None


class BothParameters(Record):
    """Parameters of the model and of its baseline."""

    model: Parameters | None = None
    baseline: Parameters | None = None


class EvaluationRecord(Record):
    """``evaluation.json``: scores, parameters and speed of a model beside its original."""

    model: Text | None = None
    baseline: Text | None = None
    tasks: list[Entry]
    means: list[Entry] = Field(default_factory=list)
    parameters: BothParameters | None = None
    size_bytes: dict[str, Count | None] | None = None
    speed: Speed | None = None
    seed: Count | None = None
    max_length: Count | None = None
    precision: Text | None = None
    command: Text | None = None
    versions: dict[str, Text] = Field(default_factory=dict)

    def main_scores(self) -> list[Entry]:
        """The entry of each task and mode that decides: Spearman correlation or nDCG@10."""
        return [entry for entry in self.tasks if entry.main]


class IndexCosines(Record):
    """Cosines between the vectors of the old and the new model."""

    mean: Number
    p5: Number


class IndexRecord(Record):
    """How well a new model searches an old model's index."""

    old: Text | None = None
    new: Text
    passages: Count
    queries: Count
    top_k: Count
    agreement: Number
    agreement_interval: Interval
    same_first: Number
    chance: Number
    cosine: IndexCosines


class Shape(Record):
    """Sizes of an encoder, as far as a record has them."""

    hidden_size: Size
    num_attention_heads: Size | None = None
    num_hidden_layers: Depth
    intermediate_size: Size
    vocab_size: Size | None = None
    head_dim: Size | None = None
    max_position_embeddings: Size | None = None
    type_vocab_size: Count | None = None
    pooler: Flag | None = None
    sparse_head: Flag | None = None
    colbert_dim: Count | None = None


class Constraint(Record):
    """How far the gates of an axis were from what is cut, shares of the axis."""

    expected_sparsity: Number
    target_sparsity: Number
    realised_sparsity: Number
    largest_distance: Number | None = None


class Projection(Record):
    """The map from a model's vectors to those of the original."""

    kind: Annotated[str, one_of(("selection", "fitted"))]
    dimensions: Count
    texts: Count | None


class Source(Record):
    """The model that was pruned; ``projection`` if its vectors are not those of its encoder."""

    base_model: Text
    revision: Text | None = None
    license: Text | None = None
    origin: Text | None = None
    projection: Projection | None = None


class PrunedParameters(Record):
    """Parameters before and after."""

    source: Parameters
    extracted: Parameters


class Kept(Record):
    """Indices that stay, in the source's numbering; ``None`` keeps all."""

    layer: list[Count] | None = None
    hidden: list[Count] | None = None
    head: list[list[Count] | None] | None = None
    intermediate: list[list[Count] | None] | None = None


class Coverage(Record):
    """What a smaller vocabulary does to the texts of a corpus."""

    corpus: Text
    role: Text
    texts: Count
    tokens: Count
    tokens_kept: Number
    texts_same: Number
    growth: Number
    unknown_before: Number
    unknown_after: Number


class VocabularyCounts(Record):
    """Tokens before and after."""

    source: Count
    kept: Count
    required: Count
    rows_saved: Count


class SavedParameters(Record):
    """Parameters that a smaller vocabulary saves."""

    saved: Count
    share_saved: Number


class Vocabulary(Record):
    """What trimming the vocabulary saved and cost."""

    vocabulary: VocabularyCounts
    scripts: list[Text]
    parameters: SavedParameters
    coverage: list[Coverage]


class Rounding(Record):
    """What rounding the weights changes."""

    dense_cosine: Number


class Precision(Record):
    """Precision of the written weights, and the cosine of dense vectors to float32."""

    dtype: Text
    rounding: Rounding
    as_loaded: Number | None = None


class MultiVector(Record):
    """The multi-vector head that was merged to a smaller dimension."""

    source_dim: Count
    colbert_dim: Count
    largest_difference: Number


class Float64Distances(Record):
    """Largest distances from torch's float64 by output; the graph is in float64 too."""

    graph: dict[str, Number]
    onnxruntime: dict[str, Number]
    torch: dict[str, Number]


class OnnxRecord(Record):
    """The ONNX file beside the model; ``float64`` is there where float32 could not tell."""

    file: Text
    bytes: Count
    outputs: list[Text]
    largest_difference: dict[str, Number]
    float64: Float64Distances | None = None


class CosineLoss(Record):
    """Cosines between the vectors of two models."""

    mean: Number
    min: Number


class Int8Cosines(Record):
    """Cosines by output."""

    dense_vecs: CosineLoss


class Int8Spearman(Record):
    """Spearman correlation with and without quantisation."""

    int8: Number
    float32: Number


class Int8Record(Record):
    """The int8 file: cosines to float32, Spearman correlations and speed."""

    file: Text
    bytes: Count
    texts: Count
    cosine: Int8Cosines
    spearman: Int8Spearman | None
    speed: Speed


class PruningRecord(Record):
    """``pruning.json``, see :func:`bge_pruning.export.pruning_record.build_record`."""

    source: Source
    source_shape: Shape
    shape: Shape
    parameters: PrunedParameters
    kept: Kept
    method: Text | None = None
    constraint: dict[str, Constraint]
    seed: Count | None = None
    batches: dict[str, Count] = Field(default_factory=dict)
    refit_texts: Count | None = None
    pooling: Pooling | None = None
    max_seq_length: Count | None = None
    versions: dict[str, Text] = Field(default_factory=dict)
    checkpoint: Text | None = None
    largest_difference: Number | None = None
    largest_difference_float64: Number | None = None
    tolerance: Number | None = None
    precision: Precision | None = None
    multi_vector: MultiVector | None = None
    vocabulary: Vocabulary | None = None
    projection: Projection | None = None
    onnx: OnnxRecord | None = None
    onnx_int8: Int8Record | None = None


class Code(Record):
    """Revision of the code, and whether it had uncommitted changes."""

    revision: Text
    changed: Flag


class Start(Record):
    """One start of a run, see :func:`bge_pruning.training.run_record.build_record`."""

    time: Text
    command: list[Text]
    seed: Count
    ranks: Count
    versions: dict[str, Text]
    code: Code | None
    data: dict[str, dict[str, dict[str, Text]]]


class RunRecord(Record):
    """``run.json``: every start of a run."""

    starts: list[Start]
