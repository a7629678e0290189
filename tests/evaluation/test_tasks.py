"""Collections as tasks of mteb: the same scores, wherever they were read."""

import pytest

from bge_pruning.datasets.retrieval_collection import RetrievalCollection, read_collection
from bge_pruning.evaluation import tasks
from bge_pruning.evaluation.retrieval import score_retrieval
from bge_pruning.evaluation.tasks import beir_task, mteb_task
from bge_pruning.evaluation.text_encoder import TextEncoder
from bge_pruning.models.pretrained import load_base_model


def test_a_task_by_name_scores_as_the_same_collection_in_files(
    collection, model_folder, monkeypatch
):
    asked = []

    def read(*arguments) -> RetrievalCollection:
        asked.append(arguments)
        return read_collection(collection)

    monkeypatch.setattr(tasks, "read_mteb_collection", read)
    named, files = mteb_task("Named", "dev", "de"), beir_task(collection)
    assert asked == [("Named", "dev", "de")]
    encoder = TextEncoder(load_base_model(str(model_folder)))
    found = score_retrieval(encoder, [named, files], ["dense", "all"])
    for mode in ("dense", "all"):
        assert found["Named", mode].values == pytest.approx(found["tiny", mode].values)
        assert found["Named", mode].by_query == found["tiny", mode].by_query
