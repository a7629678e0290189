"""Losses against NumPy and SciPy, row by row."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from scipy.stats import entropy
from torch import Tensor

from bge_pruning.models.losses import (
    cosent,
    distillation_alignment,
    distillation_similarity,
    exclude_positives,
    info_nce,
    scatter_to_teacher_space,
    score_distillation,
    sts_regression,
    token_vector_distillation,
    token_weight_distillation,
)


def unit_vectors(rows: int, size: int, seed: int = 0) -> Tensor:
    vectors = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).double()
    return torch.nn.functional.normalize(vectors, dim=-1)


def compute_similarity(
    student: Tensor, teacher: Tensor, temperature: float = 0.05, first: int = 0, rows: int = 0
) -> Tensor:
    """The loss of a process whose texts are these rows of the batch; all of them, if 0."""
    own = torch.arange(first, first + (rows or len(student)))
    return distillation_similarity(student[own], teacher[own], student, teacher, own, temperature)


def scipy_similarity(
    student: Tensor, teacher: Tensor, temperature: float = 0.05, first: int = 0, rows: int = 0
) -> float:
    student, teacher = student.numpy(), teacher.numpy()
    losses = []
    for row in range(first, first + (rows or len(student))):
        others = [i for i in range(len(student)) if i != row]
        p, q = (softmax(v[others] @ v[row] / temperature) for v in (teacher, student))
        losses.append(entropy(p, q))
    return float(np.mean(losses))


def test_regression_and_alignment_are_means_over_pairs():
    first, second = unit_vectors(6, 5, 1), unit_vectors(6, 5, 2)
    scores = torch.tensor([0.0, 0.2, 1.0, 0.5, 0.9, 0.33])
    triples = zip(first.numpy(), second.numpy(), scores, strict=True)
    expected = np.mean([(float(np.dot(a, b)) - float(s)) ** 2 for a, b, s in triples])
    assert float(sts_regression(first, second, scores)) == pytest.approx(expected, rel=1e-9)
    student, teacher = unit_vectors(6, 5, 1), unit_vectors(6, 5, 2)
    cosines = [float(np.dot(s, t)) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]
    expected = 1.0 - np.mean(cosines)
    assert float(distillation_alignment(student, teacher)) == pytest.approx(expected, rel=1e-9)
    for sign, loss in ((1.0, 0.0), (-1.0, 2.0)):
        found = distillation_alignment(student, sign * student)
        assert float(found) == pytest.approx(loss, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.02, 0.05, 1.0, 50.0])
@pytest.mark.parametrize(("texts", "sizes"), [(2, (4, 4)), (7, (5, 5)), (9, (3, 8))])
def test_similarity_is_the_mean_kl_divergence_of_the_others(texts, sizes, temperature):
    student, teacher = unit_vectors(texts, sizes[0], 1), unit_vectors(texts, sizes[1], 2)
    loss = compute_similarity(student, teacher, temperature)
    expected = scipy_similarity(student, teacher, temperature)
    assert loss.ndim == 0
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_similarity_of_own_texts_in_low_precision_and_at_a_low_temperature():
    student, teacher = unit_vectors(9, 4, 1), unit_vectors(9, 6, 2)
    parts = []
    for first in (0, 3, 6):
        parts.append(compute_similarity(student, teacher, first=first, rows=3))
        expected = scipy_similarity(student, teacher, first=first, rows=3)
        assert float(parts[-1]) == pytest.approx(expected, rel=1e-4)
    assert float(sum(parts) / 3) == pytest.approx(float(compute_similarity(student, teacher)))
    student, teacher = unit_vectors(6, 4, 1), unit_vectors(6, 4, 2)
    expected = scipy_similarity(student, teacher)
    loss = compute_similarity(student.bfloat16(), teacher.bfloat16())
    assert loss.dtype == torch.float32  # the softmax of 16-bit numbers would be too coarse
    assert float(loss) == pytest.approx(expected, rel=0.05)
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert float(compute_similarity(student, teacher, 1e-5)) == 0.0


def reference_similarity(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The same in float64 without the diagonal at all, for autograd."""
    n = len(student)
    off = ~torch.eye(n, dtype=torch.bool)
    p, q = ((v @ v.T / temperature)[off].view(n, n - 1).softmax(-1) for v in (teacher, student))
    return (p * (p.log() - q.log())).sum(-1).mean()


def gradient(loss: Callable[..., Tensor], student: Tensor, *arguments) -> Tensor:
    leaf = student.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(leaf, *arguments), leaf)
    return result


def test_gradient_of_similarity_flows_through_rows_and_columns():
    student, teacher = unit_vectors(6, 4, 1), unit_vectors(6, 5, 2)
    ours = gradient(compute_similarity, student, teacher, 0.1)
    expected = gradient(reference_similarity, student, teacher, 0.1)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [sts_regression, distillation_alignment])
def test_gradients_are_true(loss):
    first, second = unit_vectors(4, 3, 1).requires_grad_(), unit_vectors(4, 3, 2)
    rest = (torch.rand(4).double(),) if loss is sts_regression else ()
    assert torch.autograd.gradcheck(lambda v: loss(v, second, *rest), first)


@pytest.mark.parametrize("temperature", [0.0, -0.05, float("nan")])
def test_a_temperature_that_is_not_above_0_is_refused(temperature):
    eye, message = torch.eye(2), rf"^temperature {temperature} is not above 0\. To fix, set loss\."
    with pytest.raises(ValueError, match=message + r"similarity_temperature\.$"):
        compute_similarity(unit_vectors(3, 2), unit_vectors(3, 2), temperature)
    for loss, second in ((info_nce, torch.arange(2)), (score_distillation, eye)):
        with pytest.raises(ValueError, match=message + r"temperature\.$"):
            loss(eye, second, temperature)


@pytest.mark.parametrize("texts", [0, 1])
def test_fewer_than_two_texts_are_refused(texts):
    message = (
        r"^a similarity distribution needs at least 2 texts in the batch\. To fix, raise "
        r"global_train_batch_size\.$"
    )
    with pytest.raises(ValueError, match=message):
        compute_similarity(unit_vectors(texts, 2), unit_vectors(texts, 2))


@pytest.mark.parametrize("loss", [distillation_alignment, compute_similarity])
def test_nan_stays_visible(loss):
    student = unit_vectors(4, 3, 1)
    student[2, 1] = float("nan")
    assert loss(student, unit_vectors(4, 3, 2)).isnan()


def test_scatter_places_kept_dimensions_and_their_gradient():
    vectors = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.bfloat16)
    vectors.requires_grad_()
    result = scatter_to_teacher_space(vectors, torch.tensor([1, 5, 2]), 6)
    assert result.tolist() == [[0, 1, 3, 0, 0, 2], [0, 4, 6, 0, 0, 5]]
    assert result.dtype == torch.bfloat16
    (result * 10 * torch.arange(6)).sum().backward()
    assert vectors.grad.tolist() == [[10.0, 50.0, 20.0]] * 2
    assert scatter_to_teacher_space(vectors, None, 3) is vectors


def loop_cosent(first: Tensor, second: Tensor, gold: Tensor, scale: float) -> float:
    pairs = [(float(a @ b), float(g)) for a, b, g in zip(first, second, gold, strict=True)]
    ordered = [low - high for high, g in pairs for low, h in pairs if g > h]
    return math.log(1.0 + sum(math.exp(scale * difference) for difference in ordered))


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_cosent_is_the_double_loop(scale):
    first, second = unit_vectors(7, 5, 1), unit_vectors(7, 5, 2)
    gold = torch.tensor([0.0, 5.0, 2.5, 2.5, 1.0, 4.0, 5.0])
    expected = loop_cosent(first, second, gold, scale)
    assert float(cosent(first, second, gold, scale)) == pytest.approx(expected, abs=1e-9)


def test_cosent_of_equal_scores_is_zero_and_of_a_large_gap_finite():
    v = unit_vectors(4, 5)
    assert float(cosent(v, v, torch.ones(4))) == 0.0
    opposite = cosent(v[:2], torch.stack([-v[0], v[1]]), torch.tensor([1.0, 0.0]), 1e4)
    assert float(opposite) == pytest.approx(2e4)


def test_info_nce_is_its_formula_and_learns_its_temperature():
    scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).double()
    targets, temperature = torch.tensor([0, 2, 4]), 0.5
    expected = 0.0
    for row, target in zip((scores / temperature).tolist(), targets.tolist(), strict=True):
        expected -= math.log(math.exp(row[target]) / sum(map(math.exp, row))) / 3
    assert float(info_nce(scores, targets, temperature)) == pytest.approx(expected, abs=1e-6)
    scores = torch.tensor([[1.0, 9.0, 0.5], [0.0, 1.0, 0.5]])
    excluded = torch.tensor([[True, True, False], [False, True, False]])
    targets = torch.tensor([0, 1])
    left = scores[:1, [0, 2]]
    expected = (info_nce(left, targets[:1], 0.1) + info_nce(scores[1:], targets[1:], 0.1)) / 2
    assert float(info_nce(scores, targets, 0.1, excluded)) == pytest.approx(float(expected))
    scores = torch.tensor([[0.2, 0.1]])
    temperature = torch.tensor(0.5, requires_grad=True)
    info_nce(scores, torch.tensor([0]), temperature).backward()
    assert temperature.grad > 0  # the positive is on top: sharper is better
    positives = torch.tensor([[5, 7], [6, -1]])
    passages = torch.tensor([5, 6, 7, 8, 5])
    excluded = exclude_positives(positives, passages, torch.tensor([0, 1]))
    assert excluded.tolist() == [
        [False, False, True, False, True],  # the other copy of its target too
        [False, False, False, False, False],
    ]


def test_score_distillation_is_the_kl_of_scipy_and_teaches_the_student_only():
    generator = torch.Generator().manual_seed(4)
    student, teacher = (torch.randn(3, 6, generator=generator).double() for _ in range(2))
    p = torch.softmax(teacher / 0.3, -1).numpy()
    q = torch.softmax(student / 0.3, -1).numpy()
    expected = rel_entr(p, q).sum(-1).mean()
    assert float(score_distillation(student, teacher, 0.3)) == pytest.approx(expected, rel=1e-5)
    assert float(score_distillation(teacher, teacher, 0.3)) == pytest.approx(0.0, abs=1e-7)
    student = torch.tensor([[0.0, 5.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, -5.0, 0.0]], requires_grad=True)
    loss = score_distillation(student, teacher, 1.0, torch.tensor([[False, True, False]]))
    kept = score_distillation(student[:, [0, 2]], teacher[:, [0, 2]], 1.0)
    assert float(loss.detach()) == pytest.approx(float(kept.detach()))
    loss.backward()
    assert student.grad[0, 0] != 0 and student.grad[0, 1] == 0 and teacher.grad is None


def test_token_weights_and_vectors_are_compared_where_there_are_words():
    teacher = torch.tensor([[0.0, 2.0, 1.0, 9.0], [3.0, 0.0, 4.0, 0.0]])
    student = torch.tensor([[7.0, 1.0, 1.0, 0.0], [0.0, 0.0, 4.0, 1.0]])
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    expected = (1 / 5 + 10 / 25) / 2
    assert float(token_weight_distillation(student, teacher, mask)) == pytest.approx(expected)
    assert float(token_weight_distillation(0 * student, teacher, mask)) == 1.0
    assert float(token_weight_distillation(teacher, teacher, mask)) == 0.0
    # A silent teacher divides by a bound.
    loss = token_weight_distillation(torch.full((1, 3), 0.1), torch.zeros(1, 3), torch.ones(1, 3))
    assert float(loss) == pytest.approx(0.03 / 0.01)
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]]).repeat(2, 1, 1)
    student = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]]).repeat(2, 1, 1)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = 1.0 - (0.5 + 1.0) / 2
    assert float(token_vector_distillation(student, teacher, mask)) == pytest.approx(expected)
    assert float(token_vector_distillation(teacher, teacher, mask)) == pytest.approx(0.0)


@pytest.mark.parametrize("loss", [token_weight_distillation, token_vector_distillation])
def test_token_losses_of_a_split_batch_are_those_of_the_whole(loss):
    generator = torch.Generator().manual_seed(2)
    shape = (4, 5) if loss is token_weight_distillation else (4, 5, 3)
    student, teacher = (torch.rand(shape, generator=generator).double() for _ in range(2))
    mask = (torch.arange(5) < torch.tensor([[5], [1], [3], [2]])).long()
    parts = [loss(student[i : i + 2], teacher[i : i + 2], mask[i : i + 2]) for i in (0, 2)]
    assert float(loss(student, teacher, mask)) == pytest.approx(float(sum(parts)) / 2)
