"""What the benchmark of training measures, on the tiny model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bge_pruning.datasets.embedding_dataset import TokenizedTexts
from bge_pruning.models.pretrained import load_base_model
from bge_pruning.training_benchmark import (
    FIXED,
    GATES,
    GROUPED,
    PLAIN,
    RANDOM,
    TEACHER,
    StepCost,
    make_batches,
    make_trainings,
    measure_training,
    step_flops,
    summarise,
)
from bge_pruning.utils.training_cost import render_training


@pytest.fixture
def base(model_folder):
    return load_base_model(str(model_folder))


@pytest.fixture(scope="module")
def texts() -> TokenizedTexts:
    """Forty texts of 3 to 20 tokens; no token is padding."""
    generator = np.random.default_rng(2)
    lengths = generator.integers(3, 21, 40)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return TokenizedTexts(generator.integers(4, 60, starts[-1]).astype(np.int32), starts, 0)


def test_batches_of_every_kind(texts):
    kinds = make_batches(texts, 8, 12, 5, pad=1)
    assert list(kinds) == [FIXED, RANDOM, GROUPED]
    for batches in kinds.values():
        assert [len(ids) for ids, _ in batches] == [8] * 5
    assert all(ids.shape == (8, 12) and bool(mask.all()) for ids, mask in kinds[FIXED])
    tokens = {kind: sum(int(mask.sum()) for _, mask in kinds[kind]) for kind in (RANDOM, GROUPED)}
    assert tokens[RANDOM] == tokens[GROUPED] == texts.lengths.sum()
    padded = {kind: sum(ids.numel() for ids, _ in kinds[kind]) for kind in (RANDOM, GROUPED)}
    assert padded[GROUPED] < padded[RANDOM]


def test_every_training_changes_its_own_model_alone(base, texts):
    (batch, *_) = make_batches(texts, 8, 12, 5, pad=1)[RANDOM]
    before = {name: value.clone() for name, value in base.backbone.state_dict().items()}
    for step in make_trainings(base, "cpu", False).values():
        step(batch)
    for name, value in base.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_plain_is_the_same_model(base, texts):
    """Without gates ours is transformers': the first losses agree where the gates are open."""
    from bge_pruning.training_benchmark import _huggingface_model

    (ids, mask), *_ = make_batches(texts, 8, 12, 5, pad=1)[RANDOM]
    plain = _huggingface_model(base).eval()
    with torch.no_grad():
        theirs = plain(input_ids=ids, attention_mask=mask).last_hidden_state
        ours = base.backbone(ids, mask)
    real = mask.bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=0)


def test_operations_of_a_step(base):
    """Twice the weights and four times the attention's products, three times over."""
    shape = base.shape
    layer = sum(p.numel() for p in base.backbone.encoder.layer[0].parameters())
    inner = shape.num_attention_heads * shape.head_dim
    expected = 3 * shape.num_hidden_layers * (2 * layer * 7 + 4 * inner * (9 + 16))
    assert step_flops(shape, [3, 4]) == expected


def test_all_is_measured_and_rendered(base, texts):
    costs = measure_training(base, texts, 8, 12, 3)
    assert [(c.training, c.batches) for c in costs] == [
        (name, kind) for kind in (FIXED, RANDOM, GROUPED) for name in (PLAIN, GATES, TEACHER)
    ]
    for cost in costs:
        assert len(cost.seconds) == len(cost.tokens) == 3
        assert min(cost.seconds) > 0 and cost.peak_bytes > 0 and cost.utilisation > 0
        assert cost.tokens_per_second == sum(cost.tokens) / sum(cost.seconds)
    assert costs[0].padding == 0.0 < costs[3].padding
    text = render_training(summarise(costs))
    assert text.count("| gates and teacher |") == 3
    assert "times plain on random batches." in text.splitlines()[-1]


def test_ratios_are_medians_on_the_same_batch():
    def cost(training: str, kind: str, seconds: list[float]) -> StepCost:
        return StepCost(training, kind, seconds, [100, 100, 100], 0.0, 0.5, 1)

    seconds = {PLAIN: [1.0, 2.0, 4.0], GATES: [1.1, 2.4, 4.2], TEACHER: [2.2, 3.6, 4.2]}
    costs = [cost(n, k, s) for k in (FIXED, RANDOM, GROUPED) for n, s in seconds.items()]
    found = summarise(costs)
    assert found["ratios"][FIXED]["gates"][1] == pytest.approx(1.1)
    assert found["ratios"][FIXED]["teacher"][1] == pytest.approx(1.5)
    assert found["throughput"][GROUPED] == pytest.approx(7.0 / 7.7)


def test_too_few_texts(base, texts):
    with pytest.raises(ValueError, match=r"40 texts are too few for 6 batches of 8\. To fix"):
        measure_training(base, texts, 8, 12, 6)
