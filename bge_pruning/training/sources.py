"""Build the dataset of a configured source: choose its reader, cache and examples."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np

from bge_pruning.config.data_checks import mixture_ends
from bge_pruning.config.names import DATA_FOLDER, DATA_VARIABLE, HUB, SOURCE_COLUMNS
from bge_pruning.config.schema import Config, ConfigError, SourceConfig
from bge_pruning.datasets import contrastive_dataset as contrastive
from bge_pruning.datasets import mteb_dataloader as mteb
from bge_pruning.datasets.contrastive_dataset import ContrastiveDataset
from bge_pruning.datasets.embedding_dataset import (
    EmbeddingDataset,
    TokenizedTexts,
    build_tokenizer,
    replace_tokens,
    tokenize,
)
from bge_pruning.datasets.hard_negatives import cached_negatives, mine_rows, negatives_key
from bge_pruning.datasets.parallel_texts import find_parallel, read_parallel
from bge_pruning.datasets.rows import BadRows, Row, RowTable
from bge_pruning.datasets.sts_dataloader import Cut, build_cutter, read_pairs, read_sentences
from bge_pruning.datasets.tables import Table, draw_rows, fingerprint_table, table_paths
from bge_pruning.datasets.teacher_vectors import Vectors
from bge_pruning.datasets.text_corpus import ReadRows, TextCorpus, cached_corpus, corpus_key
from bge_pruning.datasets.text_files import hash_file
from bge_pruning.model_io.model_files import find_prompt, read_special_ids, read_vocabulary
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.utils.environment import torch_device
from bge_pruning.utils.files import lock_of

log = logging.getLogger(__name__)

# A highest score in this part of the range is rather one of another range.
NARROW = 0.25

SourceDataset = EmbeddingDataset | ContrastiveDataset
# Computes dense vectors of the unpruned model, ``(n, H)``, for the texts with these ``n`` numbers.
Embed = Callable[[TokenizedTexts, np.ndarray], np.ndarray | Vectors]


def build_corpus(source: SourceConfig, config: Config, base: BaseModel) -> TextCorpus:
    """Read a source as arrays, from the cache if it has been read before.

    Raises:
        FileNotFoundError: If the source is missing.
        ValueError: If a row is invalid; the message names file and line.
    """
    max_length = min(config.model.max_length, base.max_seq_length)
    skip = config.data.on_bad_row == "skip"
    tokenizer_json = base.tokenizer_files["tokenizer.json"]
    content = list(fingerprint_source(source, config).values())
    prompts, cut = resolve_prompts(source, base), None
    if source.passages is not None:
        (prompt,) = prompts.values()
        cut = build_cutter(source.passages, tokenizer_json, max_length, prompt)
    read = source_reader(source, config, cut)
    settings = (source.kind, sorted(source.columns.items()), list(source.score_range))
    mining = source.is_collection and source.mined_negatives > 0
    tokenizer = hashlib.sha256(tokenizer_json).hexdigest()
    if source.passages is not None:
        settings = (*settings, sorted(vars(source.passages).items()))
    if any(prompts.values()):
        read, settings = _prompted(read, prompts), (*settings, sorted(prompts.items()))
    key = corpus_key(content, settings, skip, mining, max_length, tokenizer)
    folder = Path(config.data.processed_folder) / f"rows-{key}"
    return cached_corpus(folder, source.name, read, tokenizer_json, max_length, skip)


def resolve_prompts(source: SourceConfig, base: BaseModel) -> dict[str, str]:
    """What is written before the texts of a source, by their role.

    What the source does not say, the model's files do, as they do to sentence-transformers.
    """
    name = (source.place,) if source.kind == "mteb" else ()
    tasks = {"sts": ("STS",), "sentences": ()}.get(source.kind, (*name, "Retrieval"))
    own = {role: find_prompt(base.prompts, role, tasks) for role in source.roles}
    return {**own, **source.prompts}


def _prompted(read: ReadRows, prompts: Mapping[str, str]) -> ReadRows:
    def rows(bad: BadRows) -> Iterable[Row]:
        count = twice = 0
        for row in read(bad):
            given = row.with_prompts(prompts)
            count += 1
            twice += bool(given.prompt) and row.text.startswith(given.prompt)
            yield given
        if 2 * twice > count:
            bad.notes.append(
                f"{twice:,} of {count:,} rows begin with their prompt, which they now have twice. "
                f"To fix, remove it from the file, or set the prompts of the source to ''."
            )

    return rows


def source_reader(source: SourceConfig, config: Config, cut: Cut | None = None) -> ReadRows:
    """The function that reads the rows of a source; ``cut`` makes passages of plain texts."""
    if source.kind == "parallel":
        texts = find_parallel(source.place, source.languages, source.lines)
        return partial(read_parallel, texts)
    return (
        _collection_reader(source) if source.is_collection else _table_reader(source, config, cut)
    )


def fingerprint_sources(config: Config) -> dict[str, dict[str, dict[str, str]]]:
    """What :func:`fingerprint_source` finds, by ``train`` and ``eval`` and by source.

    Data sets are fetched for it, and rows of streams drawn.

    Raises:
        FileNotFoundError: If some are missing; the message names all of them.
    """
    found: dict[str, dict[str, dict[str, str]]] = {}
    missing: dict[str, str] = {}
    for part, sources in (("train", config.data.train), ("eval", config.data.eval)):
        found[part] = {}
        for source in sources:
            try:
                found[part][source.name] = fingerprint_source(source, config)
            except FileNotFoundError as error:
                missing[f"{part}.{source.name}"] = str(error)
    if missing:
        others = ", ".join([*missing][1:])
        more = f" Also missing of data: {others}." if others else ""
        raise FileNotFoundError(f"{next(iter(missing.values()))}{more}")
    return found


def fingerprint_source(source: SourceConfig, config: Config) -> dict[str, str]:
    """Identify the content of a source: SHA-256 by file, or the fingerprint of a data set.

    What is chosen of the files is said too: rows, lines, and languages.
    """
    if source.kind == "mteb":
        return {source.place: mteb.mteb_fingerprint(source.place, source.split, source.subset)}
    if source.kind == "beir":
        files = mteb.collection_files(source.place, source.split)
        found = {str(path): hash_file(path) for path in files}
    elif source.kind == "parallel":
        texts = find_parallel(source.place, source.languages)
        found = {str(path): hash_file(path) for path in texts.files.values()}
    else:
        tables = _tables(source, config)
        # A stream is known by what was drawn of it.
        found = {source.path if source.streaming else t.path: fingerprint_table(t) for t in tables}
        collection = tables[0].collection
        found |= {f"{t.path} {t.subset}": fingerprint_table(t) for t in collection.values()}
    if DATA_FOLDER in source.path:  # which may be another one when the run resumes
        folder = os.environ[DATA_VARIABLE]
        names = (f"{DATA_FOLDER}/{os.path.relpath(path, folder)}" for path in found)
        found = dict(zip(names, found.values(), strict=True))
    rows = f"the first {source.rows}" if source.rows and not source.streaming else ""
    chosen = {"languages": " ".join(source.languages), "lines": source.lines, "rows": rows}
    return found | {key: value for key, value in chosen.items() if value}


def _tables(source: SourceConfig, config: Config) -> list[Table]:
    split = source.split.split("[")[0]
    collection = {
        role: Table(source.place, {}, split, subset, source.revision)
        for role, subset in source.collection.items()
    }
    on_hub = source.place.startswith(HUB)
    options = (source.split, source.subset, source.revision, source.data_files if on_hub else None)
    columns, paths = dict(source.columns), table_paths(source.place)
    tables = [Table(path, columns, *options, collection) for path in paths]
    return [_drawn(source, tables[0], config)] if source.streaming else tables


def _drawn(source: SourceConfig, stream: Table, config: Config) -> Table:
    """The rows of a stream that a run needs, in a file that is made once, by one process."""
    count, names = rows_to_draw(source, config), SOURCE_COLUMNS[source.kind]
    columns = {name: source.columns.get(name, name) for name in names}
    settings = (*vars(stream).values(), sorted(columns.items()), count, config.seed)
    path = Path(config.data.processed_folder) / f"drawn-{corpus_key(*map(str, settings))}.jsonl"
    with lock_of(path):
        if not path.is_file():
            required = {"sts": names, "contrastive": names[:2]}.get(source.kind, ())
            optional = [name for name in names if name not in required]
            draw_rows(stream, required, optional, count, config.seed, path)
    return replace(stream, path=str(path))


def rows_to_draw(source: SourceConfig, config: Config) -> int:
    """Rows of a stream that a run needs: those of its batches, or as many as the source says."""
    if source.rows:
        return source.rows
    sources = config.data.train
    usual = source.weight / sum(other.weight for other in sources) if source.weight else 1.0
    steps = int(config.max_duration[:-2])
    parts = [(steps, usual)]
    if ends := mixture_ends(config):
        lengths = np.diff([0, *ends])
        weights = [part.weights for part in config.data.stages]
        shares = [w.get(source.name, 0.0) / sum(w.values()) if w else usual for w in weights]
        parts = list(zip(lengths, shares, strict=True))
    # The schedule draws a source as often as its weight says, to within the number of sources.
    batches = sum(math.ceil(length * share) + len(sources) for length, share in parts)
    return batches * config.global_train_batch_size


def _table_reader(source: SourceConfig, config: Config, cut: Cut | None) -> ReadRows:
    tables = _tables(source, config)
    low, high = source.score_range
    readers = {
        "sts": lambda table, bad: read_pairs(table, (low, high), bad),
        "sentences": lambda table, bad: read_sentences(table, bad, source.lines, cut),
        "contrastive": contrastive.read_contrastive,
    }
    read = readers[source.kind]

    def rows(bad: BadRows) -> Iterable[Row]:
        return islice(chain.from_iterable(read(table, bad) for table in tables), source.rows)

    return rows


def _collection_reader(source: SourceConfig) -> ReadRows:
    if source.kind == "mteb":
        task = (source.place, source.split, source.subset)
        judged, others = partial(mteb.read_mteb, *task), partial(mteb.read_mteb_corpus, *task)
    else:
        folder = Path(source.place)
        judged = partial(mteb.read_beir, folder, source.split)
        others = partial(mteb.read_corpus, folder)

    def rows(bad: BadRows) -> Iterable[Row]:
        yield from judged(bad)
        if source.mined_negatives:
            yield from others(bad)

    return rows


def build_source(
    source: SourceConfig, config: Config, base: BaseModel, embed: Embed | None, model: str
) -> SourceDataset:
    """Build the examples of a source.

    Args:
        embed: Computes the unpruned model's dense vectors, where negatives are mined.
        model: Fingerprint of that model.

    Raises:
        ConfigError: If the rows lack what the losses need.
        FileNotFoundError: If the source is missing.
        ValueError: If a row is invalid.
    """
    corpus = build_corpus(source, config, base)
    corpus.bad.report(source.name)
    rows, texts = corpus.rows, corpus.texts
    if texts.truncated:
        limit = min(config.model.max_length, base.max_seq_length)
        counts = (texts.truncated, len(texts), limit)
        log.info("%s: %d of %d texts cut at %d tokens", source.name, *counts)
    if base.prompts.get("prompts") or source.prompts:
        _report_prompts(source, base)
    if source.replaced_tokens:
        texts = _replace_tokens(source, config, base, texts)
    if source.kind == "sentences":
        return EmbeddingDataset(texts, np.arange(len(texts))[:, None])
    if source.kind == "sts":
        low, high = source.score_range
        scores = (rows.scores.reshape(-1, 2)[:, 1] - low) / (high - low)
        if scores.max() <= NARROW:
            log.warning(
                "%s: no score is above %g, and its score_range goes from %g to %g: all pairs would "
                "be learned as unlike. To fix, set score_range of the source to what the scores "
                "mean, e.g. [0, 1].",
                *(source.name, rows.scores[1::2].max(), low, high),
            )
        return EmbeddingDataset(texts, rows.texts.reshape(-1, 2), scores.astype(np.float32))
    texts, queries, own = _find_negatives(source, config, base, corpus, embed, model)
    # A source without any scores has other losses; some missing scores are a mistake.
    scored = config.loss.score_distillation > 0 and not np.isnan(queries.scores).all()
    negatives = config.data.negatives_of(source)
    try:
        return ContrastiveDataset(
            *(texts, queries, negatives, config.seed, scored),
            own=own,
            in_batch=source.in_batch_negatives,
        )
    except ValueError as error:
        raise ConfigError(f"{source.name}: {error}") from None


def _find_negatives(
    source: SourceConfig,
    config: Config,
    base: BaseModel,
    corpus: TextCorpus,
    embed: Embed | None,
    model: str,
) -> tuple[TokenizedTexts, RowTable, RowTable]:
    """Texts, the queries with all their negatives, and rows of passages that are a query."""
    rows, texts = corpus.rows, corpus.texts
    queries = rows.select(rows.positives > 0)
    own = rows.select((rows.positives == 0) & (np.diff(rows.starts) > 1))
    if source.mined_negatives:
        settings = source.mined_negatives, source.mining_margin
        key = negatives_key(texts, rows, model, settings)
        path = Path(config.data.processed_folder) / f"negatives-{key}.npy"
        mined = _mine(source, corpus, (queries, own), embed, path, torch_device(config.device))
        queries = contrastive.add_negatives(queries, mined)
    if source.perturbed_negatives:
        first = _prompt_length(resolve_prompts(source, base)["passage"], base)
        options = source.perturbed_negatives, first, config.seed
        texts, queries = contrastive.add_perturbed(texts, queries, *options)
    if (source.mined_negatives or source.perturbed_negatives) and config.data.negatives_of(source):
        queries = _with_any(source, queries)
    return texts, queries, own


def _report_prompts(source: SourceConfig, base: BaseModel) -> None:
    for role, prompt in resolve_prompts(source, base).items():
        log.info("%s: adds %s to a %s", source.name, f"'{prompt}'" if prompt else "nothing", role)
        if prompt and prompt not in (base.prompts.get("prompts") or {}).values():
            log.warning(
                "%s: the files of %s do not name the prompt '%s', so the finished model will not "
                "know it, and may be trimmed of its tokens. To fix, write it into "
                "config_sentence_transformers.json there.",
                *(source.name, base.name, prompt),
            )


def _with_any(source: SourceConfig, queries: RowTable) -> RowTable:
    """The queries that have negatives, if some have: others would end the run."""
    alone = np.diff(queries.starts) == 1 + queries.positives
    if not alone.any() or alone.all():
        return queries
    log.warning(
        "%s: %d of %d queries are left out, as no negative of theirs was found. To fix, raise "
        "mining_margin of the source, which is %g, or set perturbed_negatives; a positive of one "
        "token has none.",
        *(source.name, alone.sum(), len(queries), source.mining_margin),
    )
    return queries.select(~alone)


def _prompt_length(prompt: str, base: BaseModel) -> int:
    """Tokens of a text before its own words: what begins a text, and its prompt."""
    tokenizer = build_tokenizer(base.tokenizer_files["tokenizer.json"], base.max_seq_length)
    return int(tokenize([prompt], tokenizer).lengths[0]) - 1  # without the token that ends it


def _replace_tokens(
    source: SourceConfig, config: Config, base: BaseModel, texts: TokenizedTexts
) -> TokenizedTexts:
    files = base.tokenizer_files
    special = read_special_ids(files)
    candidates = np.array(sorted(set(read_vocabulary(files).values()) - special))
    first = _prompt_length(*resolve_prompts(source, base).values(), base)
    return replace_tokens(texts, source.replaced_tokens, candidates, config.seed, first)


def _mine(
    source: SourceConfig,
    corpus: TextCorpus,
    rows: tuple[RowTable, RowTable],
    embed: Embed,
    path: Path,
    device: str,
) -> np.ndarray:
    """Mine the negatives of each query: texts of shape ``(n, k)``, -1 where there are fewer.

    The rows are those of queries with positives, and of queries that are passages themselves.
    """
    queries, _ = rows
    settings = (source.mined_negatives, source.mining_margin)
    parts = path.with_suffix(".parts")

    def compute() -> np.ndarray:
        log.info("%s: mining %d negatives for %d queries", source.name, settings[0], len(queries))
        found = {"device": device, "parts": parts}
        return mine_rows(corpus.rows, rows, partial(embed, corpus.texts), settings, **found)

    mined = cached_negatives(path, compute)
    shutil.rmtree(parts, ignore_errors=True)
    if short := int((mined < 0).any(axis=1).sum()):
        counts = short, len(mined), settings[0]
        log.warning("%s: %d of %d queries got fewer than %d mined negatives", source.name, *counts)
    return mined
