"""Which of the teacher's outputs are kept on disk, when, and what is said about it."""

import json
import logging
from collections.abc import Callable
from itertools import islice
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from composer.utils import dist

from bge_pruning.config.load import Config, ConfigError
from bge_pruning.model_io.pretrained import BaseModel
from bge_pruning.models.teacher import HIDDEN
from bge_pruning.reports.report_tables import render_bytes
from bge_pruning.training import teacher_cache
from bge_pruning.training.builders import build_teacher
from bge_pruning.training.data_builders import build_train_loader
from bge_pruning.training.plan import build_loss_weights
from bge_pruning.training.teacher_cache import CacheCost, TeacherTargets, fill_caches

MIXED = (
    "data.train=[{{name: pairs, kind: sts, path: {csv}}},"
    " {{name: asked, kind: contrastive, path: {jsonl}, negatives: 1}}]"
)
DISTIL = (
    "loss={sts_regression: 0.0, contrastive: 0.0, distillation_similarity: 0.0, "
    "distillation_alignment: 1.0, distillation_sparse: 1.0}"
)
CACHED = "teacher.cache=true"


@pytest.fixture
def make(base, sts_csv, contrastive_jsonl, configure) -> Callable[..., TeacherTargets]:
    """A function that makes the targets of a run on two sources."""

    def make(*overrides: str, model: BaseModel = base) -> TeacherTargets:
        data = MIXED.format(csv=sts_csv, jsonl=contrastive_jsonl)
        config: Config = configure(data, DISTIL, *overrides)
        teacher = build_teacher(config, model)
        sampler = build_train_loader(config, model, teacher).dataloader.batch_sampler
        names = build_loss_weights(config).distilled
        return TeacherTargets(config, model, teacher, names, sampler)

    return make


@pytest.fixture
def lines(caplog, monkeypatch) -> Callable[[], list[str]]:
    """A function that returns what was said about the teacher."""
    monkeypatch.setattr(logging.getLogger("bge_pruning"), "propagate", True)
    caplog.set_level("INFO")
    return lambda: [r.getMessage() for r in caplog.records if r.getMessage().startswith("teacher")]


def texts_on_disk(targets: TeacherTargets) -> list[set[int]]:
    return [set(cache.outputs["dense_vecs"].texts.tolist()) for cache in targets.caches]


def texts_drawn(targets: TeacherTargets, first: int, end: int) -> list[set[int]]:
    """Those of the examples that the batches really hold."""
    data, found = targets.sampler.dataset, [set(), set()]
    data.resume_at = 0
    data.schedule.seek(0)
    for batch in islice(iter(targets.sampler), first, end):
        for source, example in batch:
            found[source].update(data.datasets[source].texts_of(np.array([example])).tolist())
    return found


@pytest.mark.parametrize(("resume_at", "batches"), [(0, 2), (0, 5), (3, 5)])
def test_what_the_run_draws_is_embedded_and_nothing_else(resume_at, batches, make):
    targets = make(f"max_duration={batches}ba", CACHED)
    assert targets.decide()
    assert texts_on_disk(targets) == [set(), set()]
    targets.sampler.dataset.resume_at = resume_at
    targets.prepare()
    found = texts_on_disk(targets)
    assert found == texts_drawn(targets, resume_at, batches)
    assert sum(map(len, found)) < sum(len(d.texts) for d in targets.sampler.dataset.datasets)
    assert targets.teacher._encoder is None  # its weights would stay on the device


@pytest.mark.parametrize("resume_at", [0, 3])
def test_what_the_stages_draw_is_embedded(resume_at, make):
    stages = "data.stages=[{steps: 2, weights: {pairs: 1}}, {until: 1dur, weights: {asked: 1}}]"
    targets = make("max_duration=4ba", CACHED, stages)
    targets.decide()
    targets.sampler.dataset.resume_at = resume_at
    targets.prepare()
    assert texts_on_disk(targets) == texts_drawn(targets, resume_at, 4)
    assert (texts_on_disk(targets)[0] == set()) == (resume_at == 3)


def test_weights_of_a_checkpoint_count(make):
    """A run that is resumed after the weights changed draws by the new ones."""
    targets = make("max_duration=5ba", CACHED)
    targets.decide()
    targets.sampler.dataset.schedule.updates = [(0, np.array([0.05, 0.95]))]
    targets.prepare()
    assert texts_on_disk(targets) == texts_drawn(targets, 0, 5)
    assert texts_on_disk(targets)[0] == set()


def test_every_rank_finds_what_its_batches_need(make, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    targets = make("max_duration=2ba", CACHED)
    targets.decide()
    targets.prepare()
    encode = Mock(side_effect=AssertionError("is there already"))
    monkeypatch.setattr(targets.teacher, "encoder", encode)
    monkeypatch.setattr(dist, "get_global_rank", lambda: 1)
    monkeypatch.setattr(teacher_cache, "ask_rank_zero", lambda question: True)
    other = make("max_duration=2ba", CACHED)
    assert other.sampler.rank == 1 and other.decide()
    monkeypatch.setattr(other.teacher, "encoder", encode)
    other.prepare()
    for key in islice(iter(other.sampler), 2):
        for source, example in key:
            item = other.sampler.dataset[source, example]
            assert {"teacher_dense_vecs", "teacher_token_weights"} < item.keys()


def test_ranks_follow_the_first_one(make, monkeypatch):
    """The disk of another machine may be full, or hold the outputs already."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_global_rank", lambda: 1)
    for answer in (True, False):
        monkeypatch.setattr(teacher_cache, "ask_rank_zero", lambda _, said=answer: said)
        assert make("max_duration=2ba").decide() is answer


def test_a_run_whose_weights_change_embeds_up_to_the_next_change(make):
    changing = ("data.adapt_weights_interval=2ba", "data.adapt_batches=1", "max_duration=6ba")
    targets = make(*changing, CACHED)
    assert targets.decide()
    data = targets.sampler.dataset
    probes = [
        set(d.texts_of(targets.sampler.examples_of(source, 0, 1)).tolist())
        for source, d in enumerate(data.datasets)
    ]
    # On these the losses are measured before the first step.
    assert texts_on_disk(targets) == probes
    targets.prepare()
    expected = [a | b for a, b in zip(probes, texts_drawn(targets, 0, 2), strict=True)]
    assert texts_on_disk(targets) == expected
    data.schedule.seek(2)
    data.schedule.update([1, 9])
    data.prepare(2, 4)
    expected = [a | b for a, b in zip(expected, texts_drawn(targets, 0, 4), strict=True)]
    assert texts_on_disk(targets) == expected


MILLION = 1_000_000


@pytest.mark.parametrize(
    ("drawn", "missing", "size", "ranks", "keeps", "why"),
    [
        (5, 1, 1, 1, True, "the steps would embed 5.0 times the tokens of a cache"),
        (1.1, 1, 1, 1, False, "would embed 1.1 times the tokens of a cache"),
        (1.3, 1, 1, 1, True, "1.3 times"),
        # One process makes the cache, and eight share the steps.
        (5, 1, 1, 8, False, "5.0 times the tokens of a cache, shared by 8 processes"),
        (20, 1, 1, 8, True, ", shared by 8 processes"),
        (1.1, 0.1, 1, 1, True, "11.0 times"),  # most of it is there from another run
        (1, 0, 0, 8, True, "they are there already"),
        (5, 1, 60, 1, False, "they would take 60.0 MB of 100 MB free to write"),
    ],
)
def test_auto_chooses_by_cost(drawn, missing, size, ranks, keeps, why):
    numbers = [round(value * MILLION) for value in (drawn, missing, 3, size, 100)]
    found, reason = CacheCost(*numbers, ranks).choose()
    assert found is keeps
    assert why in reason


def test_it_says_before_what_it_will_write(make, lines, monkeypatch):
    free = SimpleNamespace(free=12_345_678)
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _: free)
    targets = make("max_duration=40ba", "teacher.cache=auto")
    assert targets.decide()
    targets.prepare()
    files = targets.caches[0].folder.parent.glob("teacher-*/*.values")
    written = sum(path.stat().st_size for path in files)
    (before, *_) = lines()
    texts = sum(map(len, texts_on_disk(targets)))
    folder = targets.config.data.processed_folder
    assert (
        f"{texts} texts on disk ({render_bytes(written)} to write to {folder}, 12.3 MB free); "
        "teacher.cache=auto, the steps would embed "
    ) in before
    assert make("max_duration=40ba", "teacher.cache=auto").decide()
    assert lines()[-1].endswith(
        f"{texts} texts on disk; teacher.cache=auto, they are there already"
    )
    again = make("max_duration=2ba", f"data.processed_folder={folder}-new")
    assert not again.decide()
    assert "computed in every step; teacher.cache=auto, the steps would embed 1." in lines()[-1]


def test_a_disk_without_room_is_refused_before_the_run(make, monkeypatch):
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    assert not make("max_duration=40ba").decide()
    message = r"teacher\.cache=true needs .* kB in data\.processed_folder .*, which has 1.00 kB fre"
    message += r"e to write\. To fix, free some, .*teacher\.cache=false"
    with pytest.raises(ConfigError, match=message):
        make("max_duration=40ba", CACHED).decide()


def test_a_folder_that_may_only_be_read(make, lines, monkeypatch):
    """What is there is used; what would have to be written is computed in the steps."""
    monkeypatch.setattr(teacher_cache.os, "access", lambda *_: False)
    assert not make("max_duration=40ba").decide()
    assert "of 0.00 kB free to write" in lines()[-1]
    monkeypatch.setattr(teacher_cache.os, "access", lambda *_: True)
    targets = make("max_duration=40ba", CACHED)
    targets.decide()
    targets.prepare()
    monkeypatch.setattr(teacher_cache.os, "access", lambda *_: False)
    assert make("max_duration=40ba").decide()


def test_hidden_states_and_false_are_computed_in_the_step(make, lines):
    assert not make("teacher.cache=false").decide()
    assert not lines()
    targets = make("loss.distillation_hidden=1.0", "max_duration=40ba")
    assert HIDDEN in targets.names
    assert not targets.decide()
    assert lines() == ["teacher.cache=auto: in every step, hidden states are too many to keep"]


def test_progress_and_the_time_left_are_logged(make, lines, monkeypatch, base):
    targets = make("max_duration=40ba", CACHED)
    targets.decide()
    clock = iter(np.arange(0.0, 1e6, 10.0))
    monkeypatch.setattr(teacher_cache.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr("bge_pruning.datasets.teacher_vectors.BATCH_TEXTS", 4)
    every = [np.arange(len(cache.texts)) for cache in targets.caches]
    fill_caches(targets.caches, every, targets.config, base, targets.teacher)
    told = [line for line in lines() if "tokens embedded" in line]
    total = sum(len(cache.texts.ids) for cache in targets.caches)  # of all sources
    assert told[-1] == f"teacher: {total:,} of {total:,} tokens embedded, left 0 s"
    assert 3 < len(told) < 50  # of 56 batches of 10 s and more each
    assert "left 0 s" not in told[0]


def test_a_teacher_that_cannot_be_read_leaves_the_run_before(train_tiny, tmp_path, copy_model):
    """Its outputs are made after the run folder, which a run with overwrite=true replaces."""
    run = train_tiny(tmp_path, "max_duration=1ba")
    folder = copy_model("broken")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    given = (f"teacher.base_model={folder}", CACHED, "overwrite=true")
    with pytest.raises(ValueError, match=r"damaged or not complete"):
        train_tiny(tmp_path, *given)
    assert list(run.glob("*.pt"))


def test_a_text_with_a_prompt_has_other_outputs(make, base, tmp_path):
    """In the cache and in the batch: what is cached is keyed by the prompt."""
    folders = []
    for prompt in ("", "the "):
        source = f"name: s, kind: sentences, path: {tmp_path}/s.txt, prompt: '{prompt}'"
        (tmp_path / "s.txt").write_text("a dog\na cat\na horse\nthere\n")
        targets = make(
            f"data.train=[{{{source}}}]", "max_duration=1ba", "global_train_batch_size=4", CACHED
        )
        targets.decide()
        targets.prepare()
        (cache,) = targets.caches
        folders.append(cache.folder)
        ids = torch.from_numpy(np.stack([cache.texts[i] for i in range(3)]).astype(np.int64))
        expected = targets.teacher.encoder()(ids, torch.ones_like(ids))["dense_vecs"]
        found = torch.from_numpy(cache.items(np.arange(3))["teacher_dense_vecs"])
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert folders[0] != folders[1]


def test_a_teacher_with_other_prompts_is_named(make, base, lines, copy_model):
    folder = copy_model("other")
    prompts = {"prompts": {"query": "ask: "}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    make(f"teacher.base_model={folder}")
    (line,) = lines()
    assert line.startswith(f"teacher '{folder}' has other prompts than {base.name}: it gets")
