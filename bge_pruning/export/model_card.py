"""The README.md of an extracted model: what strangers see of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bge_pruning.export.card_header import render_header
from bge_pruning.export.card_loading import PLACE, has_all_heads, longest_text, render_loading
from bge_pruning.export.card_rights import render_rights
from bge_pruning.export.export_text import describe_loss, render_compatibility
from bge_pruning.export.vocabulary_report import render_vocabulary
from bge_pruning.model_io.hub import display_name, hub_name, hub_page
from bge_pruning.model_io.precision import describe_precision
from bge_pruning.model_io.projection import FOLDER as DENSE
from bge_pruning.reports.markdown import escape, table
from bge_pruning.reports.summary_plot import describe_machine
from bge_pruning.reports.tables import (
    render_bytes,
    render_layers,
    render_main_scores,
    render_sizes,
    render_speed,
    share,
)

SIZES = {
    "layers": "num_hidden_layers",
    "hidden size": "hidden_size",
    "attention heads": "num_attention_heads",
    "intermediate size": "intermediate_size",
    "vocabulary": "vocab_size",
    "multi-vector size": "colbert_dim",
}
STAGES = {
    "prune": "pruning",
    "recover_larger": "recovery of the larger models that it was cut from",
    "recover": "recovery",
    "train": "training without gates",
}
CHOICES = {
    "l0": "",
    "layers": "What stays was chosen by pruning layers alone. ",
    "magnitude": "What stays was chosen by the size of the weights. ",
    "activation": "What stays was chosen by the size of activations. ",
    "reconstruction": "What stays was chosen by what the rest could not make up for. ",
    "random": "What stays was drawn at random. ",
}
PROJECTIONS = {
    "selection": "Dimensions that were removed are 0 in them.",
    "fitted": "What the removed dimensions hold was fitted by least squares on {texts:,} texts.",
}


def render_model_card(
    info: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None = None,
    index: Mapping[str, Any] | None = None,
) -> str:
    """Markdown with the metadata that the Hugging Face hub reads.

    Args:
        info: Content of ``pruning.json``.
        evaluation: What :func:`bge_pruning.evaluation.evaluate.evaluate` returns, of this model.
        index: What ``scripts/check_index_compatibility.py`` writes, of this model.
    """
    parts = [
        render_header(info, evaluation),
        f"# Pruned from {escape(display_name(info['source']))}",
        _introduction(info),
        *_removed(info),
        *_exactness(info),
        *_vocabulary(info),
        *_quality(info, evaluation),
        *_compatibility(info, index),
        *render_loading(info),
        *_limits(info),
        *render_rights(info["source"], info.get("method", "l0")),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(info: Mapping[str, Any]) -> str:
    """What it is, what it gives, what loads it."""
    name, origin = escape(display_name(info["source"])), hub_name(info["source"])
    source = f"[{name}]({hub_page(origin)})" if origin else name
    shape = info["shape"]
    size = info.get("projection", {}).get("dimensions", shape["hidden_size"])
    outputs = [f"dense vectors of {size:,} dimensions ({info['pooling']} pooling)"]
    if shape["sparse_head"]:
        outputs.append("sparse token weights")
    if shape["colbert_dim"]:
        outputs.append(f"multi-vectors of {shape['colbert_dim']:,} dimensions")
    tools = ["transformers", "sentence-transformers"]
    tools += ["FlagEmbedding"] if has_all_heads(info) else []
    tools += ["ONNX Runtime"] if "onnx" in info else []
    return (
        f"An ordinary XLM-RoBERTa encoder, cut from {source} by structured pruning. It gives "
        f"{_join(outputs)}, and loads in {_join(tools)} without code of its own."
    )


def _join(words: list[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _removed(info: Mapping[str, Any]) -> list[str]:
    source, shape = info["source_shape"], info["shape"]
    rows = [
        [label, f"{source[key]:,}", f"{shape[key]:,}", share(source[key], shape[key])]
        for label, key in SIZES.items()
        if source[key] or shape[key]
    ]
    before, after = info["parameters"]["source"], info["parameters"]["extracted"]
    rows += [
        [f"{part} parameters", f"{before[part]:,}", f"{after[part]:,}", share(count, after[part])]
        for part, count in before.items()
    ]
    near = ", and how near the learned gates were to this shape" if info.get("constraint") else ""
    return [
        "## What was removed",
        table(["", "original", "this model", "kept"], rows),
        *render_layers(info),
        f"{CHOICES.get(info.get('method', 'l0'), '')}{_training(info)} `pruning.json` "
        f"lists the kept layers, heads, units and dimensions{near}.",
    ]


def _training(info: Mapping[str, Any]) -> str:
    batches = info["batches"]
    if not batches:
        return "It was not trained after the cut."
    parts = [f"{count:,} batches of {STAGES[stage]}" for stage, count in batches.items()]
    trained = f"Trained for {_join(parts)}."
    if "refit_texts" not in info:
        return trained
    return (
        f"{trained} The recovery began by fitting its layers to the original's hidden states by "
        f"least squares, on up to {info['refit_texts']:,} training texts."
    )


def _exactness(info: Mapping[str, Any]) -> list[str]:
    """What writing it changed: nothing, but for what was asked for."""
    sentences = [
        f"The cut is exact: this model gave the same outputs as the masked model that it was cut "
        f"from (largest difference {info['largest_difference']:.1e}, float32)."
    ]
    if "precision" in info:
        sentences.append(describe_precision(info).strip())
    if "multi_vector" in info:
        turned = info["multi_vector"]
        sentences.append(
            f"The multi-vector head was turned from {turned['source_dim']:,} to "
            f"{turned['colbert_dim']:,} dimensions by an orthogonal change of basis: products of "
            f"vectors moved by {turned['largest_difference']:.1e} at most."
        )
    if "onnx" in info:
        onnx = info["onnx"]
        worst = max(onnx["largest_difference"].values())
        sentences.append(
            f"`{onnx['file']}` ({render_bytes(onnx['bytes'])}) gave the same outputs as torch "
            f"(largest difference {worst:.1e})."
        )
    if "onnx_int8" in info:
        int8 = info["onnx_int8"]
        sentences.append(
            f"`{int8['file']}` ({render_bytes(int8['bytes'])}) is rounded to int8: "
            f"{describe_loss(int8)} (measured on {escape(describe_machine(int8['speed']))})."
        )
    return ["## How exact it is", " ".join(sentences)]


def _vocabulary(info: Mapping[str, Any]) -> list[str]:
    if "vocabulary" not in info:
        return []
    return ["## Vocabulary", *render_vocabulary(info["vocabulary"])]


def _quality(info: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> list[str]:
    scores = [] if evaluation is None else render_main_scores(evaluation)
    if evaluation is None or not scores:
        baseline = hub_name(info["source"]) or "ORIGINAL"
        return [
            "## Quality",
            f"Quality: not measured. In a checkout of bge_pruning, `python "
            f"scripts/evaluate_model.py {PLACE} --baseline {baseline} --sts FILE --output "
            f"evaluation.json` measures it, and `python "
            f"scripts/write_model_card.py {PLACE} --evaluation evaluation.json` adds it here.",
        ]
    gains = [*render_sizes(evaluation), *render_speed(evaluation.get("speed"))]
    return [*scores, "`evaluation.json` holds all scores.", "## Size and speed", *gains]


def _compatibility(info: Mapping[str, Any], index: Mapping[str, Any] | None) -> list[str]:
    """Whether an index of the original's vectors keeps working."""
    parts = []
    if "projection" in info:
        found = info["projection"]
        count = found["dimensions"] * info["shape"]["hidden_size"]
        parts.append(
            f"Dense vectors live in the {found['dimensions']:,} dimensions of the original, so "
            f"that an index of its vectors keeps working. "
            f"{PROJECTIONS[found['kind']].format(texts=found['texts'] or 0)} The map, `{DENSE}`, "
            f"has {count:,} parameters more."
        )
    if index is not None:
        parts += render_compatibility(index).splitlines()
    elif parts:
        parts.append(
            f"How well: not measured. In a checkout of bge_pruning, `python "
            f"scripts/check_index_compatibility.py {hub_name(info['source']) or 'ORIGINAL'} "
            f"{PLACE} --texts FILE --output index.json` measures it, and `python "
            f"scripts/write_model_card.py {PLACE} --index index.json` adds it here."
        )
    return ["## Vector compatibility", *parts] if parts else []


def _limits(info: Mapping[str, Any]) -> list[str]:
    items = [
        f"Texts are cut at {longest_text(info):,} tokens.",
        "If the original wants words before a text, such as `query: `, so does this one.",
    ]
    source, shape = info["source_shape"], info["shape"]
    if shape["vocab_size"] != source["vocab_size"]:
        items.append(
            "Token ids are this model's own, and so are the keys of sparse weights: "
            "`vocab_map.json` holds for each id that of the vocabulary before it was trimmed. A "
            "sparse index of the original needs them translated."
        )
    if shape["hidden_size"] != source["hidden_size"] and "projection" not in info:
        items.append(
            f"Dense vectors have {shape['hidden_size']:,} dimensions, not "
            f"{source['hidden_size']:,}: an index of the original's vectors has to be made "
            f"anew."
        )
    return ["## Limits", "\n".join(f"* {item}" for item in items)]
