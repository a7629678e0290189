"""Losses of the dense output: pure functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def sts_regression(vectors1: Tensor, vectors2: Tensor, scores: Tensor) -> Tensor:
    """Mean squared error between cosine similarity and the gold score.

    Args:
        vectors1: L2-normalised vectors, shape ``(B, H)``.
        vectors2: Same shape.
        scores: Gold scores scaled to [0, 1], shape ``(B,)``.

    Returns:
        Scalar.
    """
    return F.mse_loss((vectors1 * vectors2).sum(-1), scores.to(vectors1.dtype))


def distillation_alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean cosine distance between the student's and the teacher's vectors.

    Both are compared in the teacher's space: a pruned student is 0 in its removed dimensions.

    Args:
        student: L2-normalised vectors in the teacher's space, shape ``(B, H)``.
        teacher: L2-normalised vectors, shape ``(B, H)``.

    Returns:
        Scalar in [0, 2].
    """
    return 1.0 - (student * teacher).sum(-1).mean()


def distillation_similarity(
    student: Tensor,
    teacher: Tensor,
    all_student: Tensor,
    all_teacher: Tensor,
    own: Tensor,
    temperature: float,
) -> Tensor:
    """KL divergence of the similarity distributions over the batch, teacher to student.

    Row ``i`` of each model is the softmax of its similarities with every other text; a text's
    similarity with itself is left out.

    Args:
        student: L2-normalised vectors of this process's texts, shape ``(B, Hs)``.
        teacher: L2-normalised vectors of the same texts, shape ``(B, Ht)``.
        all_student: Vectors of the whole batch over all processes, shape ``(G, Hs)``.
        all_teacher: Same texts, shape ``(G, Ht)``.
        own: Column of each row's own text in the whole batch, shape ``(B,)``.
        temperature: Softmax temperature, above 0.

    Returns:
        Scalar, mean over rows, at least 0.

    Raises:
        ValueError: If the temperature is not above 0 or the batch has fewer than 2 texts.
    """
    if not temperature > 0.0:
        raise ValueError(
            f"temperature {temperature} is not above 0. To fix, set loss.similarity_temperature."
        )
    if all_student.shape[0] < 2:
        raise ValueError(
            "a similarity distribution needs at least 2 texts in the batch. To fix, raise "
            "global_train_batch_size."
        )
    rows = torch.arange(own.shape[0], device=own.device)

    def log_distribution(queries: Tensor, keys: Tensor) -> Tensor:
        similarities = (queries @ keys.T).float() / temperature
        # Finite, since the KL multiplies it by a probability of exactly 0, and below any similarity
        # at any temperature.
        return similarities.index_put((rows, own), similarities.new_tensor(-1e30)).log_softmax(-1)

    target = log_distribution(teacher, all_teacher)
    return F.kl_div(
        log_distribution(student, all_student), target, reduction="batchmean", log_target=True
    )


def scatter_to_teacher_space(vectors: Tensor, hidden: Tensor | None, size: int) -> Tensor:
    """Place vectors of kept dimensions into the teacher's space, 0 elsewhere.

    Args:
        vectors: Shape ``(B, h)``.
        hidden: Kept dimensions, shape ``(h,)``; ``None`` if the spaces are the same.
        size: The teacher's hidden size.

    Returns:
        Shape ``(B, size)``.
    """
    if hidden is None:
        return vectors
    return vectors.new_zeros(vectors.shape[0], size).index_copy(1, hidden, vectors)
