"""Gates per axis, and the Lagrangian that holds them to a target.

Follows LLM-Shearing (Xia et al., 2023, arXiv:2310.06694): the training objective is

``L_task + sum_c [ lambda_1 (s_c - t_c) + lambda_2 (s_c - t_c)^2 ]``,

minimised over weights and gates and maximised over the multipliers, where ``s_c`` is an expected
sparsity and ``t_c`` its target. With a target *shape* there is one constraint per gated axis, with
one row per layer for heads and intermediate units, since every layer must end with the same
number. With a *budget* there is one constraint: on the encoder's expected parameters, or, for a
target speed-up, on its expected operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bge_pruning.models.encoder_shape import (
    EncoderShape,
    ParameterCount,
    count_parameters,
    expected_operations,
    expected_parameters,
    forward_flops,
)
from bge_pruning.models.hard_concrete import (
    LOG_ALPHA_MAX,
    LOG_ALPHA_MIN,
    open_probability,
    sample,
    top_k,
    top_k_unchecked,
)
from bge_pruning.models.packing import to_device
from bge_pruning.models.shape_choice import MaskLikelihood, shapes_of_budget
from bge_pruning.models.structural_pruning import AXES, SHAPE_FIELDS, PruningMasks

BUDGET = "encoder"
OPERATIONS = "operations"


@dataclass(frozen=True)
class Constraint:
    """Expected and target sparsity of one constraint of the Lagrangian.

    ``expected`` is ``(rows,)`` and differentiable in the gates; ``target`` is that of this point
    of the warm-up, ``final_target`` that after it.
    """

    expected: Tensor
    target: float
    final_target: float


class L0Module(nn.Module):
    """Hard concrete gates on any subset of axes, held to a target shape or budget.

    The trainer's algorithms set three attributes before each step: :attr:`step`, which seeds the
    noise, :attr:`warmup_progress` in [0, 1], which moves the targets, and
    :attr:`binarization_progress` in [0, 1], which is 0 until the warm-up is over and 1 at the end
    of the run. All follow from the trainer's clock, so checkpoints need not store them.

    Args:
        axes: Gated axes, a subset of ``AXES``. An axis that keeps its size must not be gated:
            clamped gates are never fully open, so its constraint could not be met.
        target_length: Tokens of the text whose operations are counted.
        init_std: Standard deviation of ``log_alpha``; with 0 all gates would stay identical.
        binarization: Weight of :meth:`binarization_loss` at the end of the run.
    """

    def __init__(
        self,
        shape: EncoderShape,
        axes: Sequence[str],
        target: EncoderShape | None = None,
        target_parameters: float | None = None,
        target_speedup: float | None = None,
        target_length: int = 128,
        start_sparsity: float = 0.0,
        init_mean: float = 3.0,
        init_std: float = 0.25,
        seed: int = 0,
        binarization: float = 0.0,
    ) -> None:
        super().__init__()
        _check_axes(axes)
        _check_target(shape, axes, target, target_parameters, target_speedup)
        self.shape = shape
        self.axes = tuple(axis for axis in AXES if axis in axes)
        self.target = target
        self.target_parameters = target_parameters
        self.target_speedup = target_speedup
        self.target_length = target_length
        self.start_sparsity = start_sparsity
        self.seed = seed
        self.binarization = binarization
        self.step = 0
        self.warmup_progress = 0.0
        self.binarization_progress = 0.0
        self.log_alpha = nn.ParameterDict(
            {axis: self._initial_gates(axis, init_mean, init_std) for axis in self.axes}
        )
        rows = {name: c.expected.numel() for name, c in self.constraints().items()}
        self.lambda_1 = nn.ParameterDict({n: nn.Parameter(torch.zeros(r)) for n, r in rows.items()})
        self.lambda_2 = nn.ParameterDict({n: nn.Parameter(torch.zeros(r)) for n, r in rows.items()})

    def _generator(self, axis: str, step: int) -> torch.Generator:
        # The CPU draws, so that the numbers are the same on every device and rank; each axis has
        # its own stream, so that they do not depend on which other axes are gated.
        mixed = (self.seed * 1_000_003 + step) * len(AXES) + AXES.index(axis)
        return torch.Generator().manual_seed(mixed % 2**63)

    def _initial_gates(self, axis: str, mean: float, std: float) -> nn.Parameter:
        generator = self._generator(axis, step=-1)
        noise = torch.randn(self.shape.gate_shapes[axis], generator=generator)
        return nn.Parameter((mean + std * noise).clamp(LOG_ALPHA_MIN, LOG_ALPHA_MAX))

    def forward(self) -> PruningMasks:
        """Sampled gates in training, deterministic gates of the final shape in evaluation."""
        return self.sample_masks() if self.training else self.deterministic_masks()

    def sample_masks(self) -> PruningMasks:
        """Sample soft gates of the present :attr:`step`, the same on all ranks and microbatches."""
        gates = {}
        for axis, log_alpha in self.log_alpha.items():
            noise = torch.rand(log_alpha.shape, generator=self._generator(axis, self.step))
            noise = noise.clamp(min=torch.finfo(torch.float32).tiny)
            gates[axis] = sample(log_alpha, to_device(noise, log_alpha.device))
        return PruningMasks(**gates)

    def deterministic_masks(self, at_target: bool = True) -> PruningMasks:
        """Binary gates: the top-k by ``log_alpha`` of each axis and layer.

        Unless k is that of the final shape (``at_target``), it is the expected number of open gates
        now: the present model during the warm-up, in general not exportable.
        """
        if at_target:
            return self.masks_of(self.realised_shape())
        open_share = {a: float(p.mean()) for a, p in self.open_probabilities().items()}
        sizes = {
            a: max(1, round(share * self.log_alpha[a].shape[-1])) for a, share in open_share.items()
        }
        return PruningMasks(**{a: top_k(self.log_alpha[a], k) for a, k in sizes.items()})

    @torch.no_grad()
    def median_masks(self) -> PruningMasks:
        """Soft gates, each at the median of its noise: the present model before a cut."""
        return PruningMasks(
            **{a: sample(g, torch.full_like(g, 0.5)) for a, g in self.log_alpha.items()}
        )

    def masks_of(self, shape: EncoderShape) -> PruningMasks:
        """Binary gates of any shape, which contain those of every smaller shape.

        The gates that are most likely open are kept. The sizes are at most those of the unpruned
        model, and equal on axes without gates.
        """
        sizes = {axis: getattr(shape, SHAPE_FIELDS[axis]) for axis in self.axes}
        return PruningMasks(**{a: top_k(self.log_alpha[a], k) for a, k in sizes.items()})

    def open_probabilities(self) -> dict[str, Tensor]:
        """``P(z > 0)`` of every gate, by axis, differentiable."""
        return {axis: open_probability(log_alpha) for axis, log_alpha in self.log_alpha.items()}

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep ``log_alpha`` in the range where its gradient is alive."""
        for log_alpha in self.log_alpha.values():
            log_alpha.clamp_(LOG_ALPHA_MIN, LOG_ALPHA_MAX)

    def expected_parameters(self) -> ParameterCount:
        """Expected parameters by part, differentiable scalars; exact at binary gates."""
        return expected_parameters(self.shape, self.open_probabilities())

    def expected_sparsity(self) -> dict[str, Tensor]:
        """Expected fraction removed: rows per layer for heads and units, one row otherwise.

        It is given by axis, for the encoder's parameters, and for its operations with a speed-up
        as target.
        """
        probabilities = self.open_probabilities()
        sparsity = {axis: (1.0 - p.mean(dim=-1)).reshape(-1) for axis, p in probabilities.items()}
        encoder = expected_parameters(self.shape, probabilities).encoder
        sparsity[BUDGET] = (1.0 - encoder / count_parameters(self.shape).encoder).reshape(1)
        if self.target_speedup is not None:
            operations = expected_operations(self.shape, probabilities, self.target_length)
            full = forward_flops(self.shape, [self.target_length])
            sparsity[OPERATIONS] = (1.0 - operations / full).reshape(1)
        return sparsity

    def final_targets(self) -> dict[str, float]:
        """Sparsity that each constraint must reach after the warm-up."""
        if self.target_speedup is not None:
            return {OPERATIONS: 1.0 - 1.0 / self.target_speedup}
        if self.target_parameters is not None:
            return {BUDGET: 1.0 - self.target_parameters / count_parameters(self.shape).encoder}
        return {
            axis: 1.0 - getattr(self.target, field) / getattr(self.shape, field)
            for axis, field in SHAPE_FIELDS.items()
            if axis in self.axes
        }

    def constraints(self) -> dict[str, Constraint]:
        """Expected and target sparsity of every constraint now."""
        expected = self.expected_sparsity()
        constraints = {}
        for name, final in self.final_targets().items():
            start = min(self.start_sparsity, final)
            target = start + (final - start) * self.warmup_progress
            constraints[name] = Constraint(expected[name], target, final)
        return constraints

    def lagrangian(self) -> Tensor:
        """``sum lambda_1 (s - t) + lambda_2 (s - t)^2`` over all constraints and rows; a scalar."""
        terms = []
        for name, constraint in self.constraints().items():
            gap = constraint.expected - constraint.target
            terms.append((self.lambda_1[name] * gap + self.lambda_2[name] * gap.square()).sum())
        return torch.stack(terms).sum()

    def binarization_loss(self) -> Tensor:
        """Distance of the gates from the present cut, which makes them decide. A scalar.

        ``c * sum_rows mean |p - m|`` of open probabilities ``p`` and the binary gates ``m`` of the
        present cut. The weight ``c`` grows after the warm-up with the third power of the time, to
        ``binarization`` at the end: while it is small, the task's loss can still change which gates
        are open. Since ``m`` meets the target, the gap to the target closes with the distance. With
        a budget the host waits for the gates, which determine the shape.
        """
        shape = self.realised_shape()
        distances = []
        for axis, p in self.open_probabilities().items():
            cut = top_k_unchecked(self.log_alpha[axis], getattr(shape, SHAPE_FIELDS[axis]))
            distances.append((p - cut).abs().mean(dim=-1).sum())
        weight = self.binarization * self.binarization_progress**3
        return weight * torch.stack(distances).sum()

    @torch.no_grad()
    def realised_shape(self) -> EncoderShape:
        """The exact shape that extraction writes.

        The target shape; with a budget, the exportable shape near it that agrees best with the
        gates: the one whose mask has the largest log-likelihood under the gates' open
        probabilities, each gate weighted by the parameters it controls.
        """
        if self.target is not None:
            return self.target
        shapes = shapes_of_budget(
            self.shape, self.axes, self.target_parameters, self.target_speedup, self.target_length
        )
        return max(shapes, key=MaskLikelihood(self.shape, self.log_alpha))

    def distances(self) -> dict[str, float]:
        """Largest distance, over rows, of expected from final target sparsity, by constraint."""
        with torch.no_grad():
            return {
                name: float((c.expected - c.final_target).abs().max())
                for name, c in self.constraints().items()
            }


def _check_axes(axes: Sequence[str]) -> None:
    unknown = sorted(set(axes) - set(AXES))
    if unknown or not axes:
        raise ValueError(
            f"pruning_modules {list(axes)} must name one or more of {list(AXES)}. To fix, "
            f"{'remove ' + ', '.join(unknown) if unknown else 'name at least one'}."
        )


def _check_target(
    shape: EncoderShape,
    axes: Sequence[str],
    target: EncoderShape | None,
    target_parameters: float | None,
    target_speedup: float | None,
) -> None:
    if sum(t is not None for t in (target, target_parameters, target_speedup)) != 1:
        raise ValueError(
            "exactly one of a target shape, a parameter budget and a speed-up is needed. To fix, "
            "set one of l0_module.target_model, l0_module.target_parameters, "
            "l0_module.target_density, l0_module.target_speedup."
        )
    if target_speedup is not None and not target_speedup > 1.0:
        raise ValueError(
            f"target_speedup {target_speedup} is not above 1: it is the factor by which "
            f"operations are reduced. To fix, set e.g. l0_module.target_speedup=2."
        )
    if target is None:
        return
    for axis, field in SHAPE_FIELDS.items():
        changes = getattr(target, field) != getattr(shape, field)
        if changes and axis not in axes:
            raise ValueError(
                f"target {field} {getattr(target, field)} differs from the source's "
                f"{getattr(shape, field)}, but '{axis}' is not in pruning_modules. To fix, add "
                f"'{axis}' or keep the size."
            )
        if axis in axes and not changes:
            raise ValueError(
                f"'{axis}' is gated but the target keeps {field} {getattr(shape, field)}: its "
                f"constraint could never be met. To fix, remove '{axis}' from the gated axes."
            )


@torch.no_grad()
def distances_to_binary(probabilities: dict[str, Tensor]) -> dict[str, float]:
    """Mean of ``min(p, 1 - p)`` by axis, and under ``all`` over all gates.

    It is 0 if every gate is certainly open or certainly closed.
    """
    distances = {axis: torch.minimum(p, 1.0 - p).flatten() for axis, p in probabilities.items()}
    distances["all"] = torch.cat(list(distances.values()))
    return {axis: float(d.mean()) for axis, d in distances.items()}
