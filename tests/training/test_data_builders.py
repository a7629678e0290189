"""Batches, the teacher's outputs with them, evaluators and collections."""

import itertools
import json
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from composer.core import Event, State, Timestamp
from composer.devices import DeviceCPU
from composer.utils import dist
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from bge_pruning.config.command_checks import check_objective
from bge_pruning.config.load import Config, ConfigError
from bge_pruning.datasets.sts_dataloader import read_sts
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.train import train
from bge_pruning.training import data_builders, teacher_cache
from bge_pruning.training import sources as source_builders
from bge_pruning.training.builders import build_base_model, build_teacher
from bge_pruning.training.data_builders import build_collections, build_evaluators
from bge_pruning.training.data_builders import build_train_loader as build_loader
from bge_pruning.training.plan import build_plan
from bge_pruning.training.run_start import check_planned, check_run

CACHED = "teacher.cache=true"
NO_TEACHER = ("loss.distillation_alignment=0", "loss.distillation_similarity=0")
INPUTS = {"input_ids", "attention_mask", "lengths", "source"}


PAIRS = [
    *(("the man plays", "a dog eats", 5.0), ("a cat", "the woman reads a red book", 0.0)),
    *(("a horse rides fast", "a", 2.5), ("the man plays", "there", 1.0)),
]


@pytest.fixture
def pairs(tmp_path) -> str:
    """The override that trains on the pairs, two in a file."""
    for index in (0, 2):
        rows = "".join(f"{a}\t{b}\t{s}\n" for a, b, s in PAIRS[index : index + 2])
        (tmp_path / f"{index}.tsv").write_text(rows)
    return f"data.train=[{{name: s, kind: sts, path: '{tmp_path}/?.tsv'}}]"


def by_scores(batch: dict[str, torch.Tensor]) -> dict[float, list[list[int]]]:
    """Token ids of each pair, without padding, by score."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    return {
        round(float(score), 4): [i[m].tolist() for i, m in zip(*pair, strict=True)]
        for score, *pair in zip(batch["scores"], ids, mask, strict=True)
    }


def test_texts_of_all_files(
    load, load_cached, pairs, model_folder, configure, tmp_path, dense_vecs
):
    """Pairs with scores in the unit interval; sentences, each once, with the teacher's vectors."""
    (batch,) = load(pairs, "global_train_batch_size=4")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    expected = {s / 5: tokenizer([a, b])["input_ids"] for a, b, s in PAIRS}
    assert by_scores(batch) == expected
    assert batch.keys() == INPUTS | {"scores"}
    (tmp_path / "a.txt").write_text("a cat\nthe dog\n")
    (tmp_path / "b.txt").write_text("the dog\na horse rides\nthere\na cat\n")
    source = f"data.train=[{{name: s, kind: sentences, path: '{tmp_path}/*.txt'}}]"
    settings = ("loss.sts_regression=0", "global_train_batch_size=4", CACHED)
    (batch,) = load_cached(configure(source, *settings))
    assert batch.keys() == INPUTS | {"teacher_dense_vecs"}
    ids, mask = batch["input_ids"].squeeze(1), batch["attention_mask"].squeeze(1)
    found = {tokenizer.decode(row, skip_special_tokens=True) for row in ids}
    assert found == {"a cat", "the dog", "a horse rides", "there"}
    vectors = batch["teacher_dense_vecs"].squeeze(1)
    torch.testing.assert_close(vectors, dense_vecs(ids, mask), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("model_length", "base_length", "length"), [(5, 128, 5), (16, 4, 4), (16, 128, 8)]
)
def test_texts_are_cut_at_the_smaller_limit_and_it_is_said(
    model_length, base_length, length, configure, base, pairs, monkeypatch
):
    messages = []
    monkeypatch.setattr(source_builders.log, "info", lambda text, *a: messages.append(text % a))
    settings = ("global_train_batch_size=4", f"model.max_length={model_length}")
    config = configure(pairs, *NO_TEACHER, *settings)
    short = replace(base, max_seq_length=base_length)
    (batch,) = build_loader(config, short, None).dataloader
    assert batch["input_ids"].shape == (4, 2, length)
    # One of the 8 texts is there twice.
    cut = {5: "s: 2 of 7 texts cut at 5 tokens", 4: "s: 4 of 7 texts cut at 4 tokens"}
    assert messages == ([cut[length]] if length in cut else [])


def test_teacher_vectors_are_kept_for_the_next_run(
    configure, base, load_cached, tmp_path, monkeypatch
):
    config = configure(CACHED)
    first = list(itertools.islice(load_cached(config), 4))
    kept = sorted((tmp_path / "processed").iterdir())
    assert [path.name.split("-")[0] for path in kept] == ["rows", "teacher"]
    teacher = build_teacher(config, base)
    monkeypatch.setattr(teacher, "encoder", lambda: pytest.fail("must not be loaded"))
    second = list(itertools.islice(load_cached(config, base, teacher), 4))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["teacher_dense_vecs"], b["teacher_dense_vecs"])
    assert sorted((tmp_path / "processed").iterdir()) == kept


def test_a_copy_of_the_teacher_has_the_same_vectors_but_not_another_model(
    configure, base, load_cached, copy_model
):
    def vector_files(config: Config, base: BaseModel) -> set[str]:
        load_cached(config, base)
        return {path.name for path in Path(config.data.processed_folder).iterdir()}

    folder = copy_model()
    copy = configure(f"teacher.base_model={folder}", CACHED)
    first = vector_files(configure(CACHED), base)
    assert vector_files(copy, base) == first
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.3.output.dense.bias"][0] += 0.5
    save_file(weights, folder / "model.safetensors")
    second = vector_files(copy, base)
    mean = configure("model.pooling=mean", CACHED)
    pooled = vector_files(mean, build_base_model(mean))
    # Wrong numbers of heads load the same weights, and are corrected in config.json alone.
    other = configure(f"teacher.base_model={copy_model('heads', num_attention_heads=2)}", CACHED)
    assert first < second < pooled < vector_files(other, base)


def test_the_first_process_makes_the_vectors(configure, load_cached, monkeypatch):
    config, kept = configure(CACHED), []

    @contextmanager
    def rank_zero_first():
        for _ in ("before", "after"):
            kept.append(len(list(Path(config.data.processed_folder).glob("teacher-*/*.jsonl"))))
            if len(kept) % 2:
                yield

    monkeypatch.setattr(teacher_cache, "rank_zero_first", rank_zero_first)
    load_cached(config)
    assert kept == [0, 0, 0, 1]  # it looks what is there, and then adds what is not


def test_batches_follow_from_the_seed_and_processes_share_them(load, monkeypatch):
    one, again, two = ([b["scores"].tolist() for b in load(f"seed={n}")] for n in (1, 1, 2))
    assert one == again != two
    whole = list(load())
    shares = []
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(dist, "get_global_rank", lambda rank=rank: rank)
        shares.append(list(load()))
    assert len(whole) == 5
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [len(part["scores"]) for part in parts] == [4, 4]
        assert {**by_scores(parts[0]), **by_scores(parts[1])} == by_scores(batch)


def test_data_that_are_not_the_first_ranks_are_refused(load, monkeypatch):
    """Copies on two machines may differ; each rank would plan other batches."""
    monkeypatch.setattr(data_builders, "ask_rank_zero", lambda _: ["another hash"])
    message = r"'train' is not the same on rank 0 and rank 0\. To fix, copy its files"
    with pytest.raises(ConfigError, match=message):
        load()


@pytest.mark.parametrize(("size", "sizes"), [(3, [3, 3, 2]), (4, [4, 4]), (8, [8]), (9, [8])])
def test_a_batch_splits_into_parts_in_order(size, sizes, configure, base):
    spec = build_loader(configure(*NO_TEACHER), base, None)
    batch = next(iter(spec.dataloader))
    parts = spec.split_batch(batch, size)
    assert [len(part["input_ids"]) for part in parts] == sizes
    for key, whole in batch.items():
        values = [part[key] for part in parts]
        if key == "source":
            assert set(values) == {whole}
        elif key == "lengths":
            joined = [row for value in values for row in value]
            assert joined == whole == batch["attention_mask"].sum(-1).tolist()
        else:
            assert torch.equal(torch.cat(values), whole)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["global_train_batch_size=41"], "global_train_batch_size 41 is larger than the training"),
        (["data.train=[{name: a, kind: sts, path: nowhere}]"], "nowhere: no such file. To fix"),
        (["data.train=[{name: a, kind: sts, path: no.csv}]"], "no.csv: no such file. To fix, chec"),
        (["data.train=[{name: a, kind: sts, path: a.jsonl}]"], r"a.jsonl:2: sentence2 .*To fix"),
    ],
)
def test_training_data_that_is_refused(overrides, message, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = '{"sentence1": "a cat", "sentence2": "b", "score": 1}\n'
    Path("a.jsonl").write_text(row + row.replace("b", r"\ud83d"))
    with pytest.raises((ValueError, OSError), match=message):
        load(*overrides)


@pytest.mark.parametrize("rows", [None, 3, 8])
def test_the_widest_batch_is_that_of_all_batches(rows, load):
    loader, sizes = load(), []
    for lengths in (batch["lengths"] for batch in loader):
        size = rows or len(lengths)
        parts = [lengths[i : i + size] for i in range(0, len(lengths), size)]
        tokens, longest = max(sum(map(sum, part)) for part in parts), max(map(max, lengths))
        sizes.append((tokens, len(lengths[0]), longest))
    assert loader.batch_sampler.widest_batch(rows) == max(sizes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: os.truncate(f / "model.safetensors", 5000),
            "model.safetensors: damaged or not complete .*To fix, copy it again",
        ),
        (lambda f: (f / "config.json").unlink(), "config.json: no such file. To fix, choose a mod"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON .*To fix"),
    ],
    ids=["cut weights", "no config", "cut config"],
)
def test_teacher_that_cannot_be_read(damage, message, configure, load_cached, copy_model, tmp_path):
    folder = copy_model()
    damage(folder)
    config = configure(f"teacher.base_model={folder}", CACHED)
    with pytest.raises((ValueError, OSError), match=message):
        load_cached(config)
    assert list((tmp_path / "processed").glob("teacher-*")) == []


def test_teacher_that_cannot_be_compared_is_refused(configure, base, copy_model):
    """The student's token ids would mean other words to it, and nothing would show it."""
    folder = copy_model()
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    words = [word for word in vocabulary if not word.startswith("<")]
    vocabulary.update(zip(words, [vocabulary[word] for word in words[::-1]], strict=True))
    path.write_text(json.dumps(tokenizer))
    config = configure(f"teacher.base_model={folder}")
    message = r"different tokenizers: .* To fix, set teacher.base_model to a model with the tok"
    with pytest.raises(ConfigError, match=message):
        build_loader(config, base, build_teacher(config, base))
    narrow = replace(base, shape=replace(base.shape, colbert_dim=16))
    config = configure("loss.distillation_colbert=1")
    message = r"has multi-vectors of 32 dimensions, .*tiny-xlmr of 16, so they cannot be compared\."
    with pytest.raises(ConfigError, match=message + r" To fix, set loss\.distillation_colbert=0"):
        build_loader(config, narrow, build_teacher(config, narrow))


def test_evaluators_hold_every_pair_once_and_similar_lengths_together(configure, base, sts_csv):
    sources = ", ".join(f"{{name: {n}, kind: sts, path: {sts_csv}}}" for n in ("dev", "test"))
    overrides = (f"data.eval=[{sources}]", "eval_batch_size=12", "eval_interval=2ba")
    evaluators = build_evaluators(configure(*overrides), base)
    assert [e.label for e in evaluators] == ["dev", "test"]
    assert [e.metric_names for e in evaluators] == [["cosine_spearman"]] * 2
    batches = list(evaluators[1].dataloader.dataloader)
    assert [len(batch["scores"]) for batch in batches] == [12, 12, 12, 4]
    widths = [batch["input_ids"].shape[2] for batch in batches]
    assert widths == sorted(widths) and widths[0] < widths[-1]
    pairs = read_sts(sts_csv)
    tokenizer = AutoTokenizer.from_pretrained(base.name)
    texts = zip(pairs.sentences1, pairs.sentences2, strict=True)
    expected = {
        round(score / 5, 4): tokenizer(list(pair), truncation=True, max_length=16)["input_ids"]
        for pair, score in zip(texts, pairs.scores, strict=True)
    }
    assert {score: ids for batch in batches for score, ids in by_scores(batch).items()} == expected
    assert build_evaluators(configure("data.eval=[]"), base) == []
    assert build_collections(configure("data.eval=[]"), base) == {}
    # They are asked at the interval and at the last batch.
    state = State(base.backbone, 0, "run", DeviceCPU(), max_duration="5ba")
    asked = []
    for batch in range(1, 6):
        state.timestamp = Timestamp(batch=batch)
        events = (Event.BATCH_END, Event.EPOCH_END, Event.FIT_END)
        asked += [(batch, e) for e in events if evaluators[0].eval_interval(state, e)]
    assert asked == [(batch, Event.BATCH_END) for batch in (2, 4, 5)]


def test_collections_are_read_with_their_split(configure, base, collection, tmp_path):
    other = shutil.copytree(collection, tmp_path / "other")
    (other / "qrels" / "test.tsv").rename(other / "qrels" / "held-out.tsv")
    first = f"{{name: a, kind: beir, path: {collection}, split: test}}"
    second = f"{{name: b, kind: beir, path: {other}, split: held-out}}"
    config = configure(f"data.eval=[{first}, {second}]", "evaluation.modes=[all, dense]")
    check_objective(config)
    found = build_collections(config, base)
    assert {name: task.split for name, task in found.items()} == {"a": "test", "b": "held-out"}
    assert build_evaluators(config, base) == []


def test_a_collection_that_is_wrong_stops_before_training(configure, collection, tmp_path):
    data = f"data.eval=[{{name: a, kind: beir, path: {collection}, split: %s}}]"
    with pytest.raises(FileNotFoundError, match=r"qrels/dev\.tsv: no such file\. To fix, check"):
        train(configure(data % "dev"))
    message = r"max_length 2 leaves no room for text beside 2 special tokens\. To fix, set max_len"
    with pytest.raises(ValueError, match=message):
        train(configure(data % "test", "evaluation.max_length=2"))
    assert not (tmp_path / "runs").exists()


def test_a_task_of_mteb_by_name(configure, base, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    message = r"^mteb task 'SciFact': cannot load split 'test' .*To fix, run once where the hub can"
    with pytest.raises(FileNotFoundError, match=message):
        train(configure("data.eval=[{name: a, kind: mteb, path: SciFact, split: test}]"))
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(data_builders, "mteb_task", lambda *a: asked.append(a) or "task")
    config = configure(
        "data.eval=[{name: a, kind: mteb, path: SciFact, split: test},"
        " {name: b, kind: mteb, path: MIRACLRetrieval, split: dev, subset: sw}]"
    )
    assert build_collections(config, base) == {"a": "task", "b": "task"}
    assert asked == [("SciFact", "test", None), ("MIRACLRetrieval", "dev", "sw")]


def test_an_output_without_its_head_is_refused_at_the_start(configure, copy_model, collection):
    folder = copy_model()
    (folder / "colbert_linear.pt").unlink()
    data = f"data.eval=[{{name: a, kind: beir, path: {collection}, split: test}}]"
    config = configure(f"model.base_model={folder}", data, "evaluation.modes=[dense, all]")
    message = (
        f"evaluation.modes: mode all needs colbert vectors, and {folder} has no head for them. To "
        f"fix, choose among dense, sparse, dense+sparse, or use a model with that head."
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_run(config)
    config = configure(f"model.base_model={folder}", "loss.distillation_colbert=1")
    message = r"loss: the loss trains colbert_vecs, and the model has no head for it\. To fix, use"
    with pytest.raises(ConfigError, match=message):
        check_planned(config, build_plan(config))
    check_run(configure(f"model.base_model={folder}", "loss.distillation_sparse=1"))
