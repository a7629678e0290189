"""Losses of the three outputs: pure functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def widen(values: Tensor) -> Tensor:
    """16-bit numbers as float32, others as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _check_temperature(temperature: Tensor | float, key: str) -> None:
    # A learned temperature is above 0 by construction; reading it would wait for the device.
    if not isinstance(temperature, Tensor) and not temperature > 0.0:
        raise ValueError(f"temperature {temperature} is not above 0. To fix, set {key}.")


def sts_regression(vectors1: Tensor, vectors2: Tensor, scores: Tensor) -> Tensor:
    """Mean squared error of cosines of vectors ``(B, H)`` to gold scores ``(B,)`` in [0, 1]."""
    return F.mse_loss((vectors1 * vectors2).sum(-1), scores.to(vectors1.dtype))


def cosent(vectors1: Tensor, vectors2: Tensor, scores: Tensor, scale: float = 20.0) -> Tensor:
    """CoSENT: pairs with a higher gold score should have the higher cosine (Su, 2022).

    ``log(1 + sum over i, j with s_i > s_j of exp(scale (cos_j - cos_i)))``. Only the order of the
    gold scores ``(B,)`` counts, as in the Spearman correlation; if all are equal, it is 0. The
    vectors ``(B, H)`` are L2-normalised, and ``scale`` is an inverse temperature.
    """
    cosines = scale * (vectors1 * vectors2).sum(-1)
    differences = cosines[None, :] - cosines[:, None]  # [i, j]: cos_j - cos_i
    ordered = scores[:, None] > scores[None, :]
    terms = differences.masked_fill(~ordered, -torch.inf).flatten()
    return torch.logsumexp(torch.cat([terms.new_zeros(1), terms]), dim=0)


def info_nce(
    scores: Tensor, targets: Tensor, temperature: Tensor | float, excluded: Tensor | None = None
) -> Tensor:
    """InfoNCE: each query should prefer its positive to all other passages (arXiv:1807.03748).

    Args:
        scores: Score of every query with every passage, shape ``(Q, P)``.
        targets: Column of each query's positive, which is never excluded, shape ``(Q,)``.
        temperature: Softmax temperature, above 0.
        excluded: True for passages that are neither the target nor a negative of a query (such as
            another copy of its positive), shape ``(Q, P)``.
    """
    _check_temperature(temperature, "loss.temperature")
    logits = scores.float() / temperature
    if excluded is not None:
        others = excluded.scatter(1, targets[:, None], False)
        logits = logits.masked_fill(others, -torch.inf)
    return F.cross_entropy(logits, targets)


def exclude_positives(positive_texts: Tensor, passage_texts: Tensor, targets: Tensor) -> Tensor:
    """Find known positives of a query, ``(Q, P)``, which must not be its negatives; but its target.

    ``positive_texts`` are the numbers of all known positives, ``(Q, K)``, padded with -1;
    ``passage_texts`` those of the batch's passages, ``(P,)``; ``targets`` the columns of positives,
    ``(Q,)``.
    """
    excluded = (positive_texts[:, :, None] == passage_texts[None, None, :]).any(dim=1)
    return excluded.scatter(1, targets[:, None], False)


def unified_loss(losses: dict[str, Tensor]) -> Tensor:
    """BGE-M3's combination, ``(dense + ensemble + 0.1 sparse + colbert) / 4`` over all outputs.

    It is the sum of the losses by name, weighted as above, over their number.
    """
    terms = [0.1 * value if name == "sparse" else value for name, value in losses.items()]
    return torch.stack(terms).sum() / len(terms)


# Scores of a query that differ by less than this differ by noise.
LEAST_SPREAD = 0.01


def spread(scores: Tensor) -> Tensor:
    """Standard deviation of each query's scores, ``(Q, 1)``, which makes a temperature unit-free.

    E5's cosines of a query with passages near to it differ by some 0.02, the scores of its sparse
    and multi-vectors by 0.1 to 0.2: no one temperature suits all of them.
    """
    return scores.float().std(-1, correction=0, keepdim=True).clamp(min=LEAST_SPREAD)


def score_distillation(
    student: Tensor,
    teacher: Tensor,
    temperature: Tensor | float,
    excluded: Tensor | None = None,
    teacher_temperature: Tensor | float | None = None,
) -> Tensor:
    """KL divergence of the distributions of scores over the passages, teacher to student.

    With the student's own ensemble score as the (detached) teacher this is BGE-M3's
    self-distillation, up to the teacher's entropy, which has no gradient. Scores are ``(Q, P)``;
    passages that are ``excluded``, ``(Q, P)``, are left out of both. A temperature may be one for
    each query, ``(Q, 1)``; the teacher's is the student's if it is ``None``.
    """
    _check_temperature(temperature, "loss.temperature")

    def log_distribution(scores: Tensor, temperature: Tensor | float) -> Tensor:
        logits = scores.float() / temperature
        if excluded is not None:
            # Finite, since the KL multiplies it by a probability of exactly 0.
            logits = logits.masked_fill(excluded, -1e30)
        return logits.log_softmax(-1)

    softness = temperature if teacher_temperature is None else teacher_temperature
    target = log_distribution(teacher.detach(), softness)
    found = log_distribution(student, temperature)
    return F.kl_div(found, target, reduction="batchmean", log_target=True)


def token_weight_distillation(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Squared error of the sparse head's token weights, relative to the teacher's own size.

    It is computed for each text and then averaged over texts, so that it does not change when a
    batch is split. It is 1 if the student's weights are all 0 and the teacher's are not. Weights
    and mask (1 for the tokens that count) have shape ``(B, T)``.
    """
    kept = mask.to(student.dtype)
    error = ((student - teacher).square() * kept).sum(-1)
    # Without this bound, texts with tiny teacher weights would dominate.
    size = (teacher.square() * kept).sum(-1).clamp(min=0.01)
    return (error / size).mean()


def token_vector_distillation(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean cosine distance of the multi-vectors of the same tokens, in [0, 2].

    It is computed for each text and then averaged over texts, so that it does not change when a
    batch is split. The vectors ``(B, T, C)`` are L2-normalised; pruning keeps ``C``. The mask
    ``(B, T)`` is 1 for the tokens that count, at least one in each text.
    """
    kept = mask.to(student.dtype)
    cosines = ((student * teacher).sum(-1) * kept).sum(-1) / kept.sum(-1)
    return 1.0 - cosines.mean()


def distillation_alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean cosine distance between the student's and the teacher's vectors ``(B, H)``, in [0, 2].

    Both are compared in the teacher's space: a pruned student is 0 in its removed dimensions.
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
        all_teacher: The teacher's vectors of the whole batch, shape ``(G, Ht)``.
        own: Column of each row's own text in the whole batch, shape ``(B,)``.
        temperature: Softmax temperature, above 0.
    """
    _check_temperature(temperature, "loss.similarity_temperature")
    if all_student.shape[0] < 2:
        raise ValueError(
            "a similarity distribution needs at least 2 texts in the batch. To fix, raise "
            "global_train_batch_size."
        )
    rows = torch.arange(own.shape[0], device=own.device)

    def log_distribution(queries: Tensor, keys: Tensor) -> Tensor:
        similarities = (widen(queries) @ widen(keys).T).float() / temperature
        # Finite, since the KL multiplies it by a probability of exactly 0, and below any similarity
        # at any temperature. It is made on the device, because copying a number would wait.
        closed = similarities.new_full((), -1e30)
        return similarities.index_put((rows, own), closed).log_softmax(-1)

    target = log_distribution(teacher, all_teacher)
    return F.kl_div(
        log_distribution(student, all_student), target, reduction="batchmean", log_target=True
    )


def hidden_state_distillation(
    student: Tensor, teacher: Tensor, weights: Tensor, mask: Tensor
) -> Tensor:
    """Squared error of the hidden states of tokens, relative to the teacher's own size.

    It is averaged over the tokens of a text and then over texts, so that it does not change when a
    batch is split; the mean over layers is weighted. It is 1 for states that are all 0.

    Args:
        student: States in the teacher's space, shape ``(B, L, T, H)``, as the teacher's.
        weights: Weight of each layer, shape ``(L,)``; their sum is 1.
        mask: 1 for real tokens, shape ``(B, T)``.
    """
    kept = mask[:, None].to(student.dtype)  # (B, 1, T)
    error = (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-6)
    layers = ((error * kept).sum(-1) / kept.sum(-1)).mean(0)
    return (layers * weights.to(layers.dtype)).sum()


def scatter_to_teacher_space(vectors: Tensor, hidden: Tensor | None, size: int) -> Tensor:
    """Place vectors ``(..., h)`` of kept dimensions ``(h,)`` into the teacher's ``(..., size)``.

    The other dimensions are 0; without ``hidden`` the spaces are the same.
    """
    if hidden is None:
        return vectors
    return vectors.new_zeros(*vectors.shape[:-1], size).index_copy(-1, hidden, vectors)
