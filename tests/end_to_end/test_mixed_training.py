"""Several sources in one run: what is trained, and resuming it.

Runs that are killed: reliability/test_kills.py.
"""

import re
from pathlib import Path

import pytest
import yaml

from bge_pruning.callbacks.data_callback import DataCallback
from bge_pruning.config.load import load_config
from bge_pruning.config.schema import ConfigError
from bge_pruning.datasets.mixed_dataloader import MixedDataset
from bge_pruning.train import train
from tests.common.hub import jsonl, write_dataset
from tests.common.trainings import extract_json, logged, read_json

TRAINING = Path(__file__).parents[2] / "configs/training"


@pytest.fixture
def mixture(sts_csv, contrastive_jsonl, tmp_path) -> tuple[str, ...]:
    """Three sources with all their losses."""
    texts = tmp_path / "texts"
    texts.mkdir()
    lines = [line.split(",")[0] for line in sts_csv.read_text().splitlines()]
    for name, part in (("a", lines[:25]), ("b", lines[25:])):
        (texts / f"{name}.txt").write_text("\n".join(part) + "\n")
    return (
        f"data.train=[{{name: pairs, kind: sts, path: {sts_csv}, weight: 0.5}},"
        f" {{name: asked, kind: contrastive, path: {contrastive_jsonl}, weight: 0.3,"
        f" negatives: 1}},"
        f" {{name: texts, kind: sentences, path: '{texts}/*.txt', weight: 0.2}}]",
        "loss={sts_regression: 0.0, cosent: 0.1, distillation_alignment: 1.0,"
        " distillation_similarity: 1.0, distillation_sparse: 0.1, distillation_colbert: 1.0,"
        " contrastive: 0.2, self_distillation: 0.1, temperature: 0.1, learn_temperature: true}",
        "model.l0_module.lagrangian_warmup_steps=2ba",
        "model.dropout=0.1",
        "scheduler.name=constant",
    )


@pytest.fixture
def batches(monkeypatch) -> list:
    """What every batch was made of, as it comes to the trainer."""
    seen = []
    start = DataCallback.batch_start

    def record(self, state, logger):
        batch = state.batch
        seen.append((state.timestamp.batch.value, batch["source"], batch["input_ids"].tolist()))
        start(self, state, logger)

    monkeypatch.setattr(DataCallback, "batch_start", record)
    return seen


def test_each_source_has_its_losses(tmp_path, train_tiny, mixture, batches):
    intervals = ("save_interval=1ep", "eval_interval=1ep")
    run = train_tiny(tmp_path, *mixture, "max_duration=1ep", *intervals)
    assert len(batches) == 40 // 8 + 40 // 8 + 40 // 8  # an epoch is as long as all sources
    sources = [source for _, source, _ in batches]
    counts = {name: sources[:10].count(name) for name in ("pairs", "asked", "texts")}
    assert counts == {"pairs": 5, "asked": 3, "texts": 2}
    # The logger counts a step when it is over.
    steps = {name: {i + 1 for i, s in enumerate(sources) if s == name} for name in counts}
    shift = min(logged(run, "loss/train/total")) - 1
    for part, expected in {
        "cosent": steps["pairs"],
        "contrastive": steps["asked"],
        "self_distillation": steps["asked"],
        "distillation_colbert": set().union(*steps.values()),
    }.items():
        assert {step - shift for step in logged(run, f"loss/train/{part}")} == expected
    assert extract_json(run, tmp_path / "small")["largest_difference"] <= 1e-5


@pytest.mark.parametrize("stop", [3, 17])
def test_going_on_gives_the_next_batches_and_the_same_model(
    stop, tmp_path, train_tiny, mixture, batches, load_state, assert_same, monkeypatch
):
    """Inside the first epoch of 15 batches and the second; dropout and all draws included."""
    # The first part is told another length, which binarization follows, and which texts the teacher
    # embeds together.
    overrides = (*mixture, "save_interval=1ba", "checkpoints_to_keep=1", "eval_interval=50ba")
    overrides += ("model.l0_module.binarization=0", "teacher.cache=false")
    whole = train_tiny(tmp_path / "whole", *overrides, "max_duration=20ba")
    everything, batches[:] = list(batches), []
    train_tiny(tmp_path / "parts", *overrides, f"max_duration={stop}ba")
    assert batches == everything[:stop]
    batches.clear()
    made = []
    item = MixedDataset.__getitem__
    monkeypatch.setattr(
        MixedDataset, "__getitem__", lambda self, index: made.append(index) or item(self, index)
    )
    parts = train_tiny(tmp_path / "parts", *overrides, "max_duration=20ba", "autoresume=true")
    assert batches == everything[stop:]
    assert len(made) == 8 * (20 - stop)  # no batch was made again to get there
    for part in ("model", "optimizers"):
        assert_same(load_state(whole)[part], load_state(parts)[part], 0.0, part)
    assert logged(whole, "loss/train/total") == logged(parts, "loss/train/total")


STAGES = (
    "data.stages=[{steps: 3, weights: {pairs: 1, texts: 2}}, {until: 6ba, weights: {asked: 1}},"
    " {until: 1dur}]"
)


@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_in_stages_goes_on_between_and_within_them(
    stop, tmp_path, train_tiny, mixture, batches, load_state, assert_same, monkeypatch
):
    """The teacher's outputs are kept for what the stages draw."""
    overrides = (*mixture, STAGES, "save_interval=1ba", "eval_interval=50ba", "max_duration=9ba")
    overrides += ("teacher.cache=true",)
    whole = train_tiny(tmp_path / "whole", *overrides)
    everything, batches[:] = list(batches), []
    sources = [source for _, source, _ in everything]
    assert sorted(sources[:3]) == ["pairs", "texts", "texts"] and sources[3:6] == ["asked"] * 3
    assert sorted(sources[6:]) == ["asked", "pairs", "texts"]
    start = DataCallback.batch_start

    def die(self, state, logger):
        if state.timestamp.batch.value == stop:
            raise RuntimeError("the machine is gone")
        start(self, state, logger)

    with monkeypatch.context() as patch:
        patch.setattr(DataCallback, "batch_start", die)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train_tiny(tmp_path / "parts", *overrides)
    parts = train_tiny(tmp_path / "parts", *overrides, "autoresume=true")
    assert batches == everything
    for part in ("model", "optimizers"):
        assert_same(load_state(whole)[part], load_state(parts)[part], 0.0, part)


def test_other_sources_than_the_run_had_are_refused(tmp_path, train_tiny, mixture, sts_csv):
    train_tiny(tmp_path, *mixture, "max_duration=3ba", "save_interval=1ba")
    other = f"data.train=[{{name: other, kind: sts, path: {sts_csv}}}]"
    fewer = ("contrastive=0", "self_distillation=0", "learn_temperature=false")
    overrides = (other, *(f"loss.{part}" for part in fewer), "max_duration=6ba")
    with pytest.raises(ValueError, match=r"trained on pairs, asked, texts, the config.*To fix"):
        train_tiny(tmp_path, *mixture, *overrides, "autoresume=true")


def test_parallel_texts_train_and_are_searched(tmp_path, train_tiny, parallel_path):
    """The last ten lines are held out; another choice of languages is said when the run resumes."""
    parallel = f"kind: parallel, path: '{parallel_path}'"
    overrides = (
        f"data.train=[{{name: many, {parallel}, languages: [de, en, th], lines: ':-10'}},"
        f" {{name: one, {parallel}, languages: [de-en], lines: ':-10'}}]",
        f"data.eval=[{{name: far, {parallel}, languages: [th, de], lines: '-10:'}}]",
        "data.on_trained_eval=error",
        "loss={sts_regression: 0.0, contrastive: 1.0, contrastive_outputs: [dense]}",
        "evaluation.keep_best=far/ndcg_at_10",
    )
    run = train_tiny(tmp_path, *overrides, "max_duration=4ba", "eval_interval=2ba")
    found = logged(run, "eval/far/ndcg_at_10")
    assert len(found) == 2 and all(0 < value <= 1 for value in found.values())
    data = read_json(run / "run.json")["starts"][0]["data"]
    assert data["train"]["many"]["lines"] == ":-10"
    assert len(data["train"]["many"]) == 3 + 2
    text = (run / "train.log").read_text()
    assert re.search(r"many +90 +90 ", text) and re.search(r"one +30 +60 ", text)
    # Data that were seen before are refused at once, and what is resumed with other ones is said.
    with pytest.raises(ConfigError, match=r"far: 2 of 20 sentences are trained on too, in many"):
        train_tiny(tmp_path / "b", overrides[0].replace("':-10'", "':-9'", 1), *overrides[1:])
    other = overrides[0].replace("[de, en, th]", "[th, en, de]")
    train_tiny(tmp_path, other, *overrides[1:], "max_duration=5ba", "autoresume=true")
    said = (run / "train.log").read_text()
    assert "data train many languages was de en th and is th en de" in said


def small_copy(source: dict, folder: Path) -> dict:
    """A source with few rows, and what it names elsewhere as files of its layout in a folder."""
    if "passages" in source:
        source = {**source, "passages": {"min_tokens": 4, "max_tokens": 16}}
    if "lines" in source:
        return {**source, "lines": ":3"}
    columns = source.get("columns", {"query": "query", "pos": "pos", "neg": "neg"})
    cells = dict.fromkeys(columns.values(), "A short text. And more of it.")
    if source["kind"] == "sentences":
        cells = {"id": "1", "url": "http", "title": "Title", "text": "One sentence. " * 12}
    rows = [{name: f"{cell} {i}" for name, cell in cells.items()} for i in range(40)]
    if source["path"].startswith("hf://"):
        return {**source, "path": f"hf://{folder}", "rows": rows}
    own = [{"query": row["query"], "pos": [row["pos"]], "neg": [row["neg"]] * 3} for row in rows]
    folder.mkdir(exist_ok=True)
    (folder / "msmarco_len-0-500.jsonl").write_text(jsonl(own))
    (folder / "msmarco_len-500-1000.jsonl").write_text(jsonl(own))
    return {**source, "path": source["path"].replace("data/bge-m3", str(folder))}


@pytest.mark.parametrize("name", ["open_data", "bge_m3_data"])
@pytest.mark.usefixtures("offline")
def test_shipped_mixtures_train_on_local_copies_of_their_corpora(name, make_yaml, tmp_path):
    content = yaml.safe_load((TRAINING / f"{name}.yaml").read_text(encoding="utf-8"))
    content["extends"] = str(TRAINING / content["extends"])
    sources, layouts = [], {}
    for source in content["data"]["train"]:
        folder = tmp_path / source["path"].partition("://")[2].replace("/", "--")
        copy = small_copy(source, folder)
        if rows := copy.pop("rows", None):
            layouts.setdefault(folder, {})[source["subset"]] = {"train": rows}
        sources.append(copy)
    for folder, configs in layouts.items():
        write_dataset(folder, configs)
    content["data"] |= {"train": sources, "eval": []}
    path = tmp_path / "copy.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    options = ["max_duration=3ba", "eval_interval=3ba", "save_interval=3ba"]
    options += ["scheduler.t_warmup=1ba", "global_train_batch_size=4"]
    config = load_config([make_yaml(tmp_path), path], options)
    run = train(config)
    assert len(logged(run, "loss/train/total")) == 3
