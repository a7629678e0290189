"""What the hub reads of a model card, read with its own client."""

import pytest
import yaml
from huggingface_hub import ModelCard

from bge_pruning.export.card_header import render_header


def read(header: str) -> dict:
    assert header.startswith("---\n") and header.endswith("\n---")
    return yaml.safe_load(header.removeprefix("---").removesuffix("---"))


def test_without_scores(make_info):
    assert read(render_header(make_info())) == {
        "base_model": "BAAI/bge-m3",
        "library_name": "sentence-transformers",
        "license": "mit",
        "pipeline_tag": "sentence-similarity",
        "tags": [
            "sentence-transformers",
            "feature-extraction",
            "xlm-roberta",
            "structured-pruning",
        ],
    }


def test_what_is_not_known_is_left_out(make_info):
    found = read(render_header(make_info("/my/models/secret", None, None)))
    assert set(found) == {"library_name", "pipeline_tag", "tags"}


@pytest.mark.parametrize("base", ["/models/é 模型", "models/x", "a: b # c", "{0}", "x`y", "../x/y"])
def test_a_local_path_is_never_the_base_model(base, make_info, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if base == "models/x":  # the form of a hub name, but a folder here
        (tmp_path / base).mkdir(parents=True)
    assert "base_model" not in read(render_header(make_info(base, origin=None)))
    header = render_header(make_info(base, origin="owner/name"))
    assert read(header)["base_model"] == "owner/name"
    assert base not in header


def test_records_of_before_there_was_an_origin(make_info):
    info = make_info()
    info["source"] = {"base_model": "BAAI/bge-m3", "revision": None}
    found = read(render_header(info))
    assert found["base_model"] == "BAAI/bge-m3" and "license" not in found


def test_a_licence_of_its_own_has_a_link(make_info):
    found = read(render_header(make_info(license_id="other")))
    assert (found["license"], found["license_link"]) == (
        "other",
        "https://huggingface.co/BAAI/bge-m3",
    )
    info = make_info("/somewhere", "other", None)
    assert "license_link" not in read(render_header(info))


def test_scores_are_the_models_results(make_info, evaluation):
    data = ModelCard(render_header(make_info(), evaluation) + "\n\n# Text\n").data
    assert data.model_name == "bge-m3-pruned"
    found = [
        (r.task_type, r.dataset_name, r.dataset_type, r.metric_type, r.metric_name, r.metric_value)
        for r in data.eval_results
    ]
    similarity = ("semantic-similarity", "stsb-en-test", "stsb-en-test")
    assert found == [
        (*similarity, "cosine_spearman", "Spearman, dense", 0.8124),
        (*similarity, "spearman", "Spearman, all", 0.7),
        *[("information-retrieval", "my <docs>", "my-docs-", "ndcg_at_10", "nDCG@10, dense", 0.5)],
    ]
    assert data.license == "mit" and data.base_model == "BAAI/bge-m3"
    assert data.library_name == "sentence-transformers"


def test_an_evaluation_without_scores_has_no_results(make_info):
    assert "model-index" not in read(render_header(make_info(), {"tasks": []}))


def test_every_kind_of_task_has_a_type():
    from bge_pruning.evaluation.tasks import RETRIEVAL, SIMILARITY
    from bge_pruning.export.card_header import TASKS

    assert set(TASKS) == {SIMILARITY, RETRIEVAL}
