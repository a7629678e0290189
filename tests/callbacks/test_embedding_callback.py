"""The health of the outputs."""

import math
import re
from types import SimpleNamespace

import pytest
import torch

from bge_pruning.callbacks import embedding_callback
from bge_pruning.callbacks.embedding_callback import EmbeddingCallback, compute_embedding_health
from tests.common.trainings import read_metrics

IDS = torch.tensor([[[0, 5, 6, 5, 2], [0, 7, 2, 1, 1]]])
BATCH = {"input_ids": IDS, "attention_mask": IDS.ne(1).long()}


def dense_health(dense: torch.Tensor, **batch: torch.Tensor) -> dict[str, float]:
    health = compute_embedding_health({"dense_vecs": dense}, {**BATCH, **batch}, ())
    return {key.removeprefix("embedding/dense/"): value for key, value in health.items()}


def test_the_health_of_dense_vectors_tokens_and_weights():
    a, b, c = torch.nn.functional.normalize(torch.randn(3, 4, dtype=torch.float64), dim=-1)
    health = dense_health(torch.stack([a, b, c])[None])
    cosines = torch.stack([a @ b, a @ c, b @ c])
    assert set(health) == {"cosine_mean", "cosine_std", "uniformity"}
    assert health["cosine_mean"] == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert health["cosine_std"] == pytest.approx(float(cosines.std(correction=0)), abs=1e-6)
    alike = dense_health(torch.ones(1, 2, 1))
    assert alike["cosine_std"] == alike["uniformity"] == 0.0
    batch = {name: value[:, :1] for name, value in BATCH.items()}
    assert compute_embedding_health({"dense_vecs": torch.ones(1, 1, 1)}, batch, ()) == {}
    weights = torch.tensor([[[9.0, 1.0, 0.5, 2.0, 9.0], [9.0, 0.0, 9.0, 0.0, 0.0]]])
    vectors = torch.tensor([[[[1.0, 0], [1, 0], [0, 1], [0, 1]], [[1, 0], [0, 1], [0, 0], [0, 0]]]])
    outputs = {"dense_vecs": torch.ones(1, 2, 1), "token_weights": weights, "colbert_vecs": vectors}
    health = compute_embedding_health(outputs, BATCH, (0, 1, 2))
    assert health["embedding/sparse/nonzeros"] == 1.0  # 5 and 6 in one text, none in the other
    assert health["embedding/sparse/empty_share"] == 0.5
    assert health["embedding/colbert/cosine_mean"] == pytest.approx((1 + 0 + 1 + 0) / 4)


def unit(*angles: float) -> torch.Tensor:
    """Vectors in the plane, in degrees."""
    radians = torch.tensor(angles, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], -1)


def squared_distance(degrees: float) -> float:
    return 2 - 2 * math.cos(math.radians(degrees))


def test_alignment_of_scored_pairs_and_of_queries_with_their_positives():
    dense = torch.stack([unit(0, 10), unit(0, 60), unit(0, 30)])
    health = dense_health(dense, scores=torch.tensor([0.8, 0.79, 1.0]))
    expected = (squared_distance(10) + squared_distance(30)) / 2
    assert health["alignment"] == pytest.approx(expected, abs=1e-6)
    assert "alignment" not in dense_health(dense)
    assert "alignment" not in dense_health(dense, scores=torch.tensor([0.0, 0.5, 0.7]))
    dense = torch.stack([unit(0, 10, 60), unit(90, 110, 130)])
    numbers = torch.tensor([[7, 8], [9, 3]])
    # The first query's positive is 7; the second's are both of its row, and 8 of the other.
    known = torch.tensor([[7, 1, -1, -1], [3, 9, 8, 2]])
    health = dense_health(dense, passage_texts=numbers, positive_texts=known)
    expected = sum(map(squared_distance, (10, 20, 40))) / 3
    assert health["alignment"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["contrastive", "sentences"])
def test_alignment_in_a_run_needs_positives(kind, tmp_path, train_tiny, contrastive_jsonl, sts_csv):
    path = contrastive_jsonl if kind == "contrastive" else sts_csv
    data = f"data.train=[{{name: q, kind: {kind}, path: {path}}}]"
    loss = "loss.contrastive=1" if kind == "contrastive" else "seed=3"
    run = train_tiny(tmp_path, data, loss, "loss.sts_regression=0", "max_duration=2ba")
    keys = {key for row in read_metrics(run) for key in row["metrics"]}
    assert "embedding/dense/uniformity" in keys
    assert ("embedding/dense/alignment" in keys) == (kind == "contrastive")


def test_a_run_logs_what_it_trains_and_what_the_table_says(tmp_path, train_tiny):
    three = ("loss.distillation_sparse=1", "loss.distillation_colbert=1")
    run = train_tiny(tmp_path, *three, "log_interval=2ba")
    logged = [row for row in read_metrics(run) if "embedding/dense/cosine_std" in row["metrics"]]
    assert [row["batch"] for row in logged] == [2, 4]
    table = set(re.findall(r"``(embedding/\S+)``", EmbeddingCallback.__doc__))
    assert {key for row in logged for key in row["metrics"]} == table


def test_of_microbatches_it_is_the_last_one(tmp_path, train_tiny, monkeypatch):
    seen = []

    def health(outputs, batch, special_ids):
        seen.append((outputs, batch))
        return compute_embedding_health(outputs, batch, special_ids)

    monkeypatch.setattr(embedding_callback, "compute_embedding_health", health)
    sizes = ("device_train_microbatch_size=3", "loss.distillation_similarity=0")
    run = train_tiny(tmp_path, *sizes, "loss.distillation_sparse=1", "max_duration=1ba")
    ((outputs, batch),) = seen
    assert outputs["token_weights"].shape[0] == len(batch["scores"]) == 2  # of 8 rows
    # Padding has no weight: the rows are those of the outputs.
    assert not outputs["token_weights"][batch["attention_mask"] == 0].any()
    assert any("embedding/sparse/nonzeros" in row["metrics"] for row in read_metrics(run))


def test_the_batch_follows_its_outputs_to_their_device(monkeypatch):
    """The trainer moves microbatches, not the batch that callbacks see."""
    seen = {}

    def health(outputs, batch, special_ids):
        seen.update(batch)
        return {}

    monkeypatch.setattr(embedding_callback, "compute_embedding_health", health)
    monkeypatch.setattr(embedding_callback, "is_due", lambda *_, **__: True)
    lengths, outputs = [[1, 2], [3, 4], [5, 6]], {"dense_vecs": torch.ones(2, 2, 4, device="meta")}
    batch = {"input_ids": torch.ones(3, 2, 6), "lengths": lengths, "source": "mine"}
    logger = SimpleNamespace(log_metrics=lambda _: None)
    EmbeddingCallback("1ba").batch_end(SimpleNamespace(outputs=outputs, batch=batch), logger)
    assert seen["input_ids"].shape == (2, 2, 6) and seen["input_ids"].device.type == "meta"
    assert seen["lengths"] == lengths[1:] and seen["source"] == "mine"
