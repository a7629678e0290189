"""Heads that are trained on the states of a frozen encoder: what changes, and what is said."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from bge_pruning.config.load import ConfigError
from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.model_io.model_files import find_prompt
from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.train import train
from bge_pruning.training import run_report
from bge_pruning.workflows import heads
from bge_pruning.workflows.heads import train_heads
from bge_pruning.workflows.training_commands import heads as main
from tests.common.trainings import losses

FILES = ("sparse_linear.pt", "colbert_linear.pt")
LOSS = (
    "loss={sts_regression: 0.0, distillation_alignment: 0.0, distillation_similarity: 0.0, "
    "contrastive: 1.0, contrastive_outputs: [dense, sparse, colbert], temperature: 0.05}"
)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(run_report, "write_report", lambda *_, **__: None)


@pytest.fixture(scope="session")
def bare_folder(tmp_path_factory, model_folder) -> Path:
    """The tiny model without heads, with prompts and mean pooling."""
    folder = tmp_path_factory.mktemp("bare") / "bare"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns(*FILES))
    prompts = {"prompts": {"query": "red ", "passage": "blue "}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    pooling = json.loads((folder / "1_Pooling/config.json").read_text())
    pooling |= {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    return folder


@pytest.fixture
def overrides(bare_folder, contrastive_jsonl, collection) -> list[str]:
    data = f"{{name: asked, kind: contrastive, path: {contrastive_jsonl}}}"
    return [
        f"model.base_model={bare_folder}",
        "model.l0_module=null",
        "model.freeze_encoder=true",
        "model.init_missing_heads=true",
        "model.colbert_dim=8",
        f"data.train=[{data}]",
        f"data.eval=[{{name: held, kind: beir, path: {collection}, split: test}}]",
        LOSS,
        "max_duration=6ba",
        "optimizer.lr=1e-2",
    ]


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name in FILES
        for key, value in torch.load(folder / name, weights_only=True).items()
    }


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-5, msg=name)


def test_the_encoder_keeps_every_bit_and_the_heads_learn(
    configure, overrides, bare_folder, tmp_path
):
    record = train_heads(configure(*overrides), "bge-pruning heads my.yaml")
    folder = tmp_path / "results/tiny/model"
    before = load_file(bare_folder / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    trained = read(folder)
    assert trained["colbert_linear.pt.weight"].shape == (8, 32)
    start = load_base_model(str(bare_folder), None, None, 0.0, True, 8).heads
    assert not torch.equal(trained["colbert_linear.pt.weight"], start.colbert_linear.weight)
    assert trained["sparse_linear.pt.weight"].abs().min() > 0  # they were 0
    assert record.loss["last"] < record.loss["first"]
    assert record.outputs == ["token_weights", "colbert_vecs"] and record.colbert_dim == 8
    assert json.loads((folder / "heads.json").read_text()) == record.as_dict()
    card = (folder / "README.md").read_text()
    assert "bge-pruning heads my.yaml" in card and "multi-vectors of 8 dimensions" in card
    written = load_base_model(str(folder))
    assert written.heads.pooling == "mean"
    assert find_prompt(written.prompts, "query") == "red "
    assert not (folder / "pruning.json").exists()  # it is the original of what is pruned next
    optimizer = torch.load(tmp_path / "runs/tiny/latest-rank0.pt", weights_only=False)
    (states,) = optimizer["state"]["optimizers"].values()
    assert sum("backbone" in str(name) for name in states["state"]) == 0
    assert len(states["state"]) == 4


def test_the_folder_is_laid_out_as_flagembedding_reads_it(configure, overrides, tmp_path):
    """It loads the encoder with transformers, and fills ``Linear(H, 1)`` and ``Linear(H, D)``."""
    train_heads(configure(*overrides, "data.eval=[]"))
    folder = tmp_path / "results/tiny/model"
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    sparse, colbert = torch.nn.Linear(32, 1), torch.nn.Linear(32, 8)
    for head, name in ((sparse, FILES[0]), (colbert, FILES[1])):
        head.load_state_dict(torch.load(folder / name, weights_only=True))
    batch = AutoTokenizer.from_pretrained(folder)(["red blue cat"], return_tensors="pt")
    with torch.no_grad():
        hidden = encoder(**batch).last_hidden_state
        weights = torch.relu(sparse(hidden))[0, :, 0]
        vectors = torch.nn.functional.normalize(colbert(hidden[:, 1:]), dim=-1)[0]
    ours = TextEncoder(load_base_model(str(folder)))
    names = ("token_weights", "colbert_vecs")
    with torch.no_grad():
        found = ours.compute(batch["input_ids"], batch["attention_mask"], names)
    torch.testing.assert_close(found["token_weights"][0], weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["colbert_vecs"][0], vectors, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pieces", ["null", "3"])
def test_states_are_the_same_kept_or_computed_in_the_step(configure, overrides, tmp_path, pieces):
    found = []
    for name, cache in (("kept", "true"), ("computed", "false")):
        given = [f"run_name={name}", f"teacher.cache={cache}", "data.eval=[]"]
        train_heads(configure(*overrides, *given, f"device_train_microbatch_size={pieces}"))
        found.append(read(tmp_path / f"results/{name}/model"))
        kept = list((tmp_path / "processed").glob("teacher-*/last_states-*.values"))
        assert len(kept) == 1
    assert_close(*found)
    kept, computed = (losses(tmp_path / f"runs/{name}") for name in ("kept", "computed"))
    assert kept == pytest.approx(computed, abs=1e-5)


def test_a_resumed_run_gives_the_same_heads(configure, overrides, tmp_path):
    overrides.append("data.eval=[]")
    train_heads(configure(*overrides, "run_name=whole"))
    half = configure(*overrides, "save_interval=3ba")
    run = train(half)
    (run / "ba6-rank0.pt").unlink()
    (run / "latest-rank0.pt").unlink()
    shutil.rmtree(tmp_path / "processed")  # the states that are missing are computed again
    train_heads(configure(*overrides, "save_interval=3ba", "autoresume=true"))
    results = tmp_path / "results"
    whole, resumed = read(results / "whole/model"), read(results / "tiny/model")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_the_numbers_of_the_report_are_right(configure, overrides, collection, tmp_path):
    record = train_heads(configure(*overrides))
    encoder = TextEncoder(load_base_model(str(tmp_path / "results/tiny/model")))
    rows = [json.loads(line) for line in (collection / "corpus.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in (collection / "queries.jsonl").read_text().splitlines()]
    texts = ["blue " + f"{row['title']} {row['text']}".strip() for row in rows]
    queries, passages = (
        [outputs(encoder, text) for text in part]
        for part in ([f"red {row['text']}" for row in asked], texts)
    )
    relevant: dict[str, dict[str, int]] = {}
    for line in (collection / "qrels/test.tsv").read_text().splitlines()[1:]:
        query, passage, score = line.split("\t")
        relevant.setdefault(query, {})[passage] = int(score)
    found = []
    for row, query in zip(asked, queries, strict=True):
        scores = [float((query["vectors"] @ p["vectors"].T).amax(1).mean()) for p in passages]
        ranked = sorted(zip(scores, rows, strict=True), key=lambda pair: -pair[0])
        gains = [relevant[row["_id"]].get(passage["_id"], 0) for _, passage in ranked[:10]]
        ideal = sorted(relevant[row["_id"]].values(), reverse=True)
        found.append(discounted(gains) / discounted(ideal))
    after = record.after
    assert after.ndcg_at_10["held"]["colbert"] == pytest.approx(np.mean(found), abs=1e-5)
    lit = [{t for t, weight in p["weights"] if weight > 0} for p in passages]
    shares = [weight > 0 for p in passages for _, weight in p["weights"]]
    assert after.sparse["held"].per_text == pytest.approx(np.mean([len(ids) for ids in lit]))
    assert after.sparse["held"].share == pytest.approx(np.mean(shares))
    assert record.before.sparse["held"].share == 1.0  # all tokens weigh alike
    assert record.before.ndcg_at_10["held"]["dense"] == after.ndcg_at_10["held"]["dense"]
    values = losses(tmp_path / "runs/tiny")
    assert record.loss == {"first": values[0], "last": values[-1]}


def discounted(gains: list[int]) -> float:
    return sum(gain / np.log2(rank + 2) for rank, gain in enumerate(gains))


def outputs(encoder: TextEncoder, text: str) -> dict:
    """Multi-vectors of a text, and its tokens, special ones apart, with their weights."""
    ids = torch.from_numpy(encoder.tokenize([text])[0]).long()[None]
    with torch.no_grad():
        found = encoder.compute(ids, torch.ones_like(ids), ("token_weights", "colbert_vecs"))
    pairs = zip(ids[0].tolist(), found["token_weights"][0].tolist(), strict=True)
    kept = [(token, weight) for token, weight in pairs if token not in encoder.special_ids]
    return {"vectors": found["colbert_vecs"][0], "weights": kept}


def test_the_command_prints_what_it_found(tiny_yaml, overrides, capsys):
    given = [o for o in overrides if "freeze" not in o and "colbert_dim" not in o]
    assert main([str(tiny_yaml), *given, "--colbert-dim", "4"]) == 0
    out = capsys.readouterr().out
    assert "held" in out and "1.0" not in out.split("held")[0]
    assert "100% > " in out and "results/tiny/model" in out


def test_a_dry_run_prints_the_plan_of_heads(tiny_yaml, overrides, capsys, tmp_path):
    assert main([str(tiny_yaml), *overrides, "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert "nothing: heads alone" in out and "states of the encoder" in out
    assert not (tmp_path / "results").exists()


def test_a_head_that_was_not_trained_is_not_written(configure, overrides, tmp_path):
    sparse = LOSS.replace(", colbert]", "]")
    train_heads(configure(*overrides, sparse, "data.eval=[]"))
    folder = tmp_path / "results/tiny/model"
    assert (folder / FILES[0]).is_file() and not (folder / FILES[1]).exists()


def test_heads_are_trained_on_with_the_encoder_open(configure, overrides, tmp_path, bare_folder):
    train_heads(configure(*overrides, "data.eval=[]"))
    first = tmp_path / "results/tiny/model"
    then = ["run_name=open", f"model.base_model={first}", "model.freeze_encoder=false"]
    record = train_heads(configure(*overrides, *then))
    assert record.encoder == "trained too"
    weights = load_file(tmp_path / "results/open/model/model.safetensors")
    before = load_file(bare_folder / "model.safetensors")
    assert any(not torch.equal(value, weights[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["model.base_model={whole}"], "has sparse_linear.pt and colbert_linear.pt already"),
        (["model.l0_module.target_density=0.5"], "heads are trained for a whole model"),
        (["data.train=[{{name: t, kind: sentences, path: {csv}}}]"], "kind sentences"),
        (["model.colbert_dim=0"], "colbert_dim 0 is not above 0"),
        (["model.init_missing_heads=false"], "colbert_dim is 8, but .* has no multi-vectors"),
        (
            ["model.base_model={whole}", "model.freeze_encoder=false"],
            "colbert_dim is 8, but .* has multi-vectors of 32",
        ),
        (["loss.contrastive_outputs=[dense]"], "names no head to train"),
        (["loss.distillation_alignment=1"], "no use for a distillation"),
        (["model.replace_heads=true", "loss.contrastive_outputs=[sparse]"], "lacks colbert"),
        (["data.eval=[{{name: t, kind: sts, path: {csv}}}]"], "heads are judged by retrieval"),
        (["evaluation.keep_best=held/ndcg_at_10"], "evaluated before and after"),
    ],
)
def test_what_cannot_be_trained_is_refused_first(
    given, message, configure, overrides, model_folder, sts_csv, tmp_path
):
    words = [text.format(whole=model_folder, csv=sts_csv) for text in given]
    with pytest.raises(ConfigError, match=message):
        train_heads(configure(*overrides, *words))
    assert not (tmp_path / "runs").exists() and not (tmp_path / "results").exists()


def test_heads_are_replaced_when_told(configure, overrides, model_folder, tmp_path):
    config = configure(*overrides, f"model.base_model={model_folder}", "model.replace_heads=true")
    record = train_heads(config)
    assert record.before.sparse["held"].share == 1.0
    assert read(tmp_path / "results/tiny/model")["colbert_linear.pt.weight"].shape == (8, 32)


def test_a_model_that_is_there_is_kept(configure, overrides, tmp_path, monkeypatch):
    folder = tmp_path / "results/tiny/model"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    monkeypatch.setattr(heads, "judge", lambda *_: pytest.fail("it was read already"))
    with pytest.raises(FileExistsError, match="exists and is kept"):
        train_heads(configure(*overrides))
