"""BGE-M3's sparse and multi-vector head for an encoder that has none, and how good they are."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bge_pruning.config.command_checks import check_heads
from bge_pruning.config.names import RETRIEVAL_METRICS
from bge_pruning.config.schema import Config, ConfigError
from bge_pruning.datasets.mteb_dataloader import passage_text
from bge_pruning.datasets.mteb_tasks import data_of
from bge_pruning.evaluation.scoring import score_tasks
from bge_pruning.evaluation.tasks import Task
from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.model_io.checkpoint import as_base_model, find_checkpoint, load_trained_model
from bge_pruning.model_io.hub import CARD, fetch_model_folder
from bge_pruning.model_io.model_files import find_prompt
from bge_pruning.model_io.model_folder import write_model_folder
from bge_pruning.model_io.pretrained import BaseModel, read_heads
from bge_pruning.reports.markdown import fence, table
from bge_pruning.training.builders import build_base_model
from bge_pruning.training.data_builders import build_collections
from bge_pruning.training.held_out import check_held_out
from bge_pruning.training.plan import build_loss_weights
from bge_pruning.training.rank_watch import on_rank_zero
from bge_pruning.training.run_start import check_run, find_base_folder
from bge_pruning.training.stage import all_ranks
from bge_pruning.utils.environment import torch_device
from bge_pruning.utils.files import atomic_folder, check_free, write_json
from bge_pruning.utils.json_records import Number, Record, Text, parse_json

log = logging.getLogger(__name__)

MARKER = "heads.json"
MODES = ("dense", "sparse", "colbert", "all")
HEADS = {"token_weights": "sparse_linear", "colbert_vecs": "colbert_linear"}
# Steps at the start and at the end of a run whose loss is averaged, as a share of the run.
ENDS = 0.1
# Passages of a collection whose sparse vectors are counted.
COUNTED = 2000


class SparseCounts(Record):
    """What of passages has a sparse weight above 0.

    Attributes:
        share: Of their tokens, special ones apart.
        per_text: Different tokens of a passage, on average: entries of an index.
    """

    share: Number
    per_text: Number


class Judgement(Record):
    """How good a model is on collections.

    Attributes:
        ndcg_at_10: By collection and mode.
        sparse: By collection.
    """

    ndcg_at_10: dict[str, dict[str, Number]]
    sparse: dict[str, SparseCounts]


class HeadsRecord(Record):
    """``heads.json``: what was trained, and what it gives.

    Attributes:
        loss: Mean of the first and of the last tenth of the steps, with their names.
        before: With new heads: all tokens weigh alike, and multi-vectors are the states of tokens
            or, of another size, a random projection of them.
    """

    base_model: Text
    encoder: Text
    outputs: list[Text]
    colbert_dim: int
    steps: Text
    data: list[Text]
    loss: dict[str, Number]
    before: Judgement
    after: Judgement


def train_heads(config: Config, command: str = "") -> HeadsRecord | None:
    """Train heads, write the model with them to ``RESULTS/model``, and judge it.

    A frozen encoder keeps every bit. On several ranks training is shared and the first rank does
    the rest.

    Args:
        command: How this was called, for the card.

    Returns:
        The record, as in ``heads.json`` of the model, on rank 0; ``None`` on the others.

    Raises:
        ConfigError: If the base model has the heads already, or the configuration does not fit.
        OSError: If a folder is in use, or the model cannot be loaded.
        StoppedError: If a signal ends it.
    """
    from bge_pruning.train import train

    output, again = Path(config.results_folder) / "model", config.overwrite or config.autoresume
    records: list[HeadsRecord] = []

    def finish() -> None:
        model = load_heads(config)
        after = judge(model, tasks, config)
        records.append(_record(config, model, before[0], after))
        write_heads(model, records[0], output, again, command)

    with all_ranks(config):
        check_new_heads(config)
        check_run(config)
        check_free(output, MARKER, again)
        tasks, before = _read_tasks(config)
        # What is evaluated here need not be evaluated there.
        train(replace(config, data=replace(config.data, eval=[])))
        on_rank_zero(finish)
    return records[0] if records else None


def _read_tasks(config: Config) -> tuple[dict[str, Task], list[Judgement]]:
    """The collections, and on rank 0 how good a model with new heads is on them."""
    base, before = build_base_model(config), []
    tasks = build_collections(config, base)
    check_held_out(config, base, tasks)
    on_rank_zero(lambda: before.append(judge(base, tasks, config)))
    return tasks, before


def check_new_heads(config: Config) -> None:
    """Refuse, before any weights are read, heads that are there already, see the arguments.

    Raises:
        ConfigError: If a frozen encoder has one of the heads to train, and it is not replaced.
    """
    check_heads(config)
    m = config.model
    folder = find_base_folder(config) or fetch_model_folder(m.base_model, m.revision)
    given = read_heads(folder)
    asked = [HEADS[name] for name in build_loss_weights(config).trained if name in HEADS]
    there = [f"{name}.pt" for name in asked if given[name] is not None]
    if there and m.freeze_encoder and not m.replace_heads:
        raise ConfigError(
            f"{m.base_model} has {' and '.join(there)} already. To fix, pass --replace "
            f"(model.replace_heads=true) to train new ones, or take another model."
        )


def load_heads(config: Config) -> BaseModel:
    """The trained model of a run, without heads that were made and not trained."""
    trained = load_trained_model(find_checkpoint(Path(config.run_folder)))
    names = build_loss_weights(config).trained
    given = read_heads(fetch_model_folder(config.model.base_model, config.model.revision))
    for output, head in HEADS.items():
        if output not in names and given[head] is None:
            setattr(trained.heads, head, None)
    model = as_base_model(trained, config.model.base_model)
    model.license, model.origin = trained.metadata.license, trained.metadata.origin
    return model


@torch.no_grad()
def judge(base: BaseModel, tasks: Mapping[str, Task], config: Config) -> Judgement:
    """Score a model on collections in every mode that it has heads for, and count its weights."""
    options = (torch_device(config.device), config.evaluation.max_length, config.eval_batch_size)
    encoder = TextEncoder(base, *options)
    scores: dict[str, dict[str, float]] = {}
    sparse = {}
    for name, task in tasks.items():
        found = score_tasks(encoder, [task], MODES)
        scores[name] = {mode: s.values[RETRIEVAL_METRICS[0]] for (_, mode), s in found.items()}
        if base.heads.sparse_linear is not None:
            sparse[name] = count_weights(encoder, _passages(base, task))
    return Judgement(ndcg_at_10=scores, sparse=sparse)


def _passages(base: BaseModel, task: Task) -> list[str]:
    prompt = find_prompt(base.prompts, "passage")
    rows = list(data_of(task.mteb_task, task.split)["corpus"])[:COUNTED]
    return [prompt + passage_text(row, f"passage {row['id']}", empty=True) for row in rows]


def count_weights(encoder: TextEncoder, passages: list[str]) -> SparseCounts:
    """Count the tokens of passages with a weight above 0; special tokens have none."""
    weighted = tokens = entries = 0
    special = torch.tensor(encoder.special_ids, device=encoder.device)
    texts = encoder.tokenize(passages)
    for _, ids, mask, outputs in encoder.batches(texts, ("token_weights",)):
        lexical = mask.bool() & ~torch.isin(ids, special)
        kept = (outputs["token_weights"] > 0) & lexical
        weighted, tokens = weighted + int(kept.sum()), tokens + int(lexical.sum())
        entries += sum(len(row[on].unique()) for row, on in zip(ids, kept, strict=True))
    return SparseCounts(share=weighted / max(tokens, 1), per_text=entries / len(passages))


def _record(config: Config, model: BaseModel, before: Judgement, after: Judgement) -> HeadsRecord:
    colbert = model.heads.colbert_linear
    return HeadsRecord(
        base_model=config.model.base_model,
        encoder="frozen" if config.model.freeze_encoder else "trained too",
        outputs=[n for n in build_loss_weights(config).trained if n in HEADS],
        colbert_dim=0 if colbert is None else colbert.out_features,
        steps=f"{config.max_duration} of {config.global_train_batch_size}, seed {config.seed}",
        data=[source.name for source in config.data.train],
        loss=read_losses(Path(config.run_folder) / "metrics.jsonl"),
        before=before,
        after=after,
    )


def read_losses(path: Path) -> dict[str, float]:
    """Mean loss of the first and of the last steps of a run."""
    rows = [parse_json(line, str(path), "train again") for line in path.read_bytes().splitlines()]
    key = "loss/train/total"
    values = [row["metrics"][key] for row in rows if key in row["metrics"]]
    count = max(1, int(ENDS * len(values)))
    return {"first": float(np.mean(values[:count])), "last": float(np.mean(values[-count:]))}


def write_heads(
    model: BaseModel, record: HeadsRecord, output: Path, overwrite: bool, command: str
) -> None:
    """Write an ordinary model folder with the record and a card."""
    with atomic_folder(output, MARKER, overwrite) as folder:
        write_model_folder(
            folder,
            model.backbone,
            model.heads,
            model.shape,
            model.hf_config,
            model.tokenizer_files,
            model.max_seq_length,
            model.prompts,
        )
        write_json(record.as_dict(), folder / MARKER)
        (folder / CARD).write_text(render_card(model, record, command), encoding="utf-8")
    log.info("wrote %s", output)


def render_card(model: BaseModel, record: HeadsRecord, command: str) -> str:
    """The README.md of the folder."""
    facts: dict[str, Any] = {"license": model.license, "base_model": model.origin}
    header = ["---", *(f"{key}: {value}" for key, value in facts.items() if value)]
    lines = [
        "library_name: sentence-transformers",
        "pipeline_tag: sentence-similarity",
        "---",
        "",
        f"# {Path(record.base_model).name} with BGE-M3's heads",
        "",
        f"{record.base_model} (encoder {record.encoder}) with heads for {_listed(record)}, trained "
        f"for {record.steps}, on {', '.join(record.data)}.",
        "",
        table(*score_rows(record)),
        "",
    ]
    if command:
        lines += [fence(command, "bash"), ""]
    return "\n".join([*header, *lines])


def _listed(record: HeadsRecord) -> str:
    names = {"token_weights": "sparse weights", "colbert_vecs": "multi-vectors"}
    given = [names[name] for name in record.outputs]
    size = f" of {record.colbert_dim} dimensions" if "colbert_vecs" in record.outputs else ""
    return " and ".join(given) + size


def score_rows(record: HeadsRecord) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: nDCG@10 of each mode and sparse weights, before and after."""
    header = ["nDCG@10, before > after", *MODES, "tokens with a weight", "of them a text"]
    rows = []
    for name, after in record.after.ndcg_at_10.items():
        both = (record.before.ndcg_at_10[name], after)
        cells = [" > ".join(f"{s[m]:.4f}" if m in s else "-" for s in both) for m in MODES]
        counts = [part.sparse.get(name) for part in (record.before, record.after)]
        shares = " > ".join("-" if c is None else f"{c.share:.0%}" for c in counts)
        texts = " > ".join("-" if c is None else f"{c.per_text:.0f}" for c in counts)
        rows.append([name, *cells, shares, texts])
    return header, rows
