"""What the JSON files of this project hold, as far as it is read again."""

from __future__ import annotations

from bge_pruning.utils.records import (
    ANYTHING,
    COUNT,
    DEPTH,
    FLAG,
    NUMBER,
    POSITIVE,
    SIZE,
    TEXT,
    TRAININGS,
    Each,
    Either,
    OneOf,
    Optional,
)
from bge_pruning.utils.tasks import METRIC_TITLES

MODES = ("dense", "sparse", "colbert", "dense+sparse", "all")

PARAMETERS = {"encoder": POSITIVE, "embeddings?": COUNT, "pooler?": COUNT, "heads?": COUNT}
PARAMETERS |= {"total": POSITIVE}

ENTRY = {
    "task": TEXT,
    "kind?": OneOf("similarity", "retrieval"),
    "mode": OneOf(*MODES),
    "metric?": OneOf(*METRIC_TITLES),
    "main": FLAG,
    "value": NUMBER,
    "baseline": Optional(NUMBER),
    "floor": NUMBER,
    "floors?": Each(NUMBER),
    "retention": Optional(NUMBER),
    "retention_above_floor?": Optional(NUMBER),
    "also?": Each(Optional(NUMBER)),
    "texts?": COUNT,
    "truncated?": COUNT,
    "interval?": (NUMBER, NUMBER),
    "p_value?": Optional(NUMBER),
}
_BOTH = {
    "model?": ANYTHING,
    "baseline?": ANYTHING,
    "ratio": POSITIVE,
    "ratio_iqr?": (POSITIVE, POSITIVE),
}
_TIME = {"median": POSITIVE, "p95?": POSITIVE}
_MEMORY = {"texts": COUNT, "tokens": COUNT, "model": Each(COUNT), "baseline": Each(COUNT)}
SPEED = {
    "device?": TEXT,
    "threads?": Optional(COUNT),
    "batch_size?": COUNT,
    "latency_ms": _BOTH | {"model?": _TIME, "baseline?": _TIME},
    "throughput_texts_per_s": _BOTH | {"model?": POSITIVE, "baseline?": POSITIVE},
    "memory_bytes?": Optional(_MEMORY),
}
EVALUATION = {
    "model?": TEXT,
    "baseline?": Optional(TEXT),
    "tasks": [ENTRY],
    "parameters?": Optional({"model?": Optional(PARAMETERS), "baseline?": Optional(PARAMETERS)}),
    "size_bytes?": Optional(Each(Optional(COUNT))),
    "speed?": Optional(SPEED),
    "seed?": Optional(COUNT),
    "command?": Optional(TEXT),
    "versions?": Each(TEXT),
}

SHAPE = {
    "hidden_size": SIZE,
    "num_attention_heads?": SIZE,
    "num_hidden_layers": DEPTH,
    "intermediate_size": SIZE,
    "vocab_size?": SIZE,
    "head_dim?": SIZE,
    "max_position_embeddings?": SIZE,
    "type_vocab_size?": COUNT,
    "pooler?": FLAG,
    "sparse_head?": FLAG,
    "colbert_dim?": COUNT,
}
CONSTRAINT = {
    "expected_sparsity": NUMBER,
    "target_sparsity": NUMBER,
    "realised_sparsity": NUMBER,
    "largest_distance?": NUMBER,
}
_LOSS = {"mean": NUMBER, "min": NUMBER}
_COVERAGE = {"corpus": TEXT, "role": TEXT, "texts": COUNT, "tokens": COUNT, "tokens_kept": NUMBER}
_COVERAGE |= {"texts_same": NUMBER, "growth": NUMBER, "unknown_before": NUMBER}
_COVERAGE |= {"unknown_after": NUMBER}
VOCABULARY = {
    "vocabulary": {"source": COUNT, "kept": COUNT, "required": COUNT, "rows_saved": COUNT},
    "scripts": [TEXT],
    "parameters": {"saved": COUNT, "share_saved": NUMBER},
    "coverage": [_COVERAGE],
}
INT8 = {
    "file": TEXT,
    "bytes": COUNT,
    "texts": COUNT,
    "cosine": {"dense_vecs": _LOSS},
    "spearman": Optional({"int8": NUMBER, "float32": NUMBER}),
    "speed": SPEED,
}
KEPT = {
    "layer?": Optional([COUNT]),
    "hidden?": Optional([COUNT]),
    "head?": Optional([Optional([COUNT])]),
    "intermediate?": Optional([Optional([COUNT])]),
}
PRUNING = {
    "source": {
        "base_model": TEXT,
        "revision?": Optional(TEXT),
        "license?": Optional(TEXT),
        "origin?": Optional(TEXT),
    },
    "source_shape": SHAPE,
    "shape": SHAPE,
    "parameters": {"source": PARAMETERS, "extracted": PARAMETERS},
    "kept": KEPT,
    "method?": TEXT,
    "constraint": Each(CONSTRAINT),
    "seed?": COUNT,
    "batches?": Each(COUNT),
    "refit_texts?": COUNT,
    "pooling?": OneOf("cls", "mean"),
    "max_seq_length?": COUNT,
    "versions?": Each(TEXT),
    "checkpoint?": TEXT,
    "largest_difference?": NUMBER,
    "precision?": {"dtype": TEXT, "rounding": {"dense_cosine": NUMBER}},
    "multi_vector?": {"source_dim": COUNT, "colbert_dim": COUNT, "largest_difference": NUMBER},
    "vocabulary?": VOCABULARY,
    "projection?": {
        "kind": OneOf("selection", "fitted"),
        "dimensions": COUNT,
        "texts": Optional(COUNT),
    },
    "onnx?": {"file": TEXT, "bytes": COUNT, "outputs": [TEXT], "largest_difference": Each(NUMBER)},
    "onnx_int8?": INT8,
}
FULL_SHAPE = {
    "num_hidden_layers": DEPTH,
    **dict.fromkeys(("hidden_size", "num_attention_heads"), SIZE),
    **dict.fromkeys(("intermediate_size", "vocab_size", "head_dim"), SIZE),
    **dict.fromkeys(("max_position_embeddings", "type_vocab_size"), SIZE),
    "pooler": FLAG,
    "sparse_head": FLAG,
    "colbert_dim": COUNT,
}
# What a checkpoint says about its run, see bge_pruning.model_io.checkpoint.RunMetadata.
RUN_METADATA = {
    "base_model": TEXT,
    "shape": FULL_SHAPE,
    "hf_config": {"pad_token_id": COUNT, "layer_norm_eps": NUMBER},
    "pooling": OneOf("cls", "mean"),
    "max_seq_length": COUNT,
    "seed": COUNT,
    "l0_module": Optional(
        {
            "axes": [OneOf("layer", "head", "intermediate", "hidden")],
            "target": Optional(FULL_SHAPE),
            "target_parameters": Optional(POSITIVE),
            "target_speedup?": Optional(POSITIVE),
            "target_length?": COUNT,
            "start_sparsity?": NUMBER,
            "init_mean?": NUMBER,
            "init_std?": NUMBER,
            "seed": COUNT,
            "binarization?": NUMBER,
        }
    ),
    "source_pruning": Optional(PRUNING),
    "versions": Each(TEXT),
    "revision?": Optional(TEXT),
    "prompts?": Optional(
        {"prompts?": Optional(Each(TEXT)), "default_prompt_name?": Optional(TEXT)}
    ),
    "license?": Optional(TEXT),
    "origin?": Optional(TEXT),
    "refit_texts?": COUNT,
}
INDEX = {
    "old?": TEXT,
    "new": TEXT,
    "passages": COUNT,
    "queries": COUNT,
    "top_k": COUNT,
    "agreement": NUMBER,
    "agreement_interval": (NUMBER, NUMBER),
    "same_first": NUMBER,
    "chance": NUMBER,
    "cosine": {"mean": NUMBER, "p5": NUMBER},
}
_MEASURED = {"latency_ms": {"median": NUMBER, "p95": NUMBER}, "texts_per_s": NUMBER}
# Of benchmark_efficiency.py with a baseline, and of benchmark_training.py.
_PLACE = {"machine": {"gpu": Optional(TEXT)}, "dtype": TEXT}
SPEED_RESULT = {
    "model": TEXT,
    **_PLACE,
    "settings": [
        {
            "runtime": TEXT,
            "batch_size": COUNT,
            "length": Either(OneOf("real"), COUNT),
            "rounds": COUNT,
            "model": _MEASURED,
            "baseline": _MEASURED,
            "speedup": {"median": NUMBER, "quartiles": (NUMBER, NUMBER)},
            "ideal": NUMBER,
            "share": NUMBER,
            "noisy": FLAG,
        }
    ],
}
STEPS_RESULT = {
    "model": TEXT,
    "batch_size": COUNT,
    **_PLACE,
    "ratios": Each(Each((NUMBER, NUMBER, NUMBER))),
    "throughput": Each(Optional(NUMBER)),
    "costs": [
        {
            "batches": TEXT,
            "training": OneOf(*TRAININGS),
            "median_seconds": NUMBER,
            "tokens_per_second": NUMBER,
            "padding": NUMBER,
            "utilisation": NUMBER,
            "peak_bytes": NUMBER,
        }
    ],
}
# What reports read of a run's config.yaml, and a line of its metrics.jsonl.
CONFIG_FILE = {"model?": Optional({"base_model?": TEXT}), "seed?": Optional(COUNT)}
HISTORY_ROW = {"batch": COUNT, "metrics": Each(ANYTHING)}
