"""Detects non-finite losses, gradients, weights and gates in the step in which they occur."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from composer.core import Algorithm, Event, Precision, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

log = logging.getLogger(__name__)

# AdamW stores squares: the square of a larger number is infinite, and its parameter would freeze.
LIMIT = math.sqrt(torch.finfo(torch.float32).max)
CHECKPOINTS = {Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT}
KINDS = {"weights": "weight", "gates": "gate", "multipliers": "multiplier"}
LOWER_LR = "lower optimizer.lr or look for broken texts in that source"
ADVICE = {
    "weight": LOWER_LR,
    "gate": "lower optimizer.l0_lr",
    "multiplier": "lower optimizer.lagrangian_lr and optimizer.lambda_2_lr",
}
KEPT = "The last checkpoint is kept, and autoresume=true resumes from it."


class NonFiniteGuard(Algorithm):
    """Stops the run at a number that is not finite, or skips the step that would spread it.

    Every step checks the parts of the loss, the gradient norm of every trained tensor as the
    backward pass left it, and the gates (clamped: an infinite one is finite again) and multipliers
    after the optimizer's step. Weights are checked before a checkpoint of them is written, so that
    the last good one stays.

    The norms are those that clipping needs anyway; it takes them from here, because it would
    spread one broken number to all gradients. To stop, the host reads them after the trainer has
    fetched the losses, when the device has nothing left to do. To skip, it has to wait for the
    backward pass before the optimizer's step. All ranks decide alike. A skipped step changes
    neither weights, gates, multipliers nor AdamW's moments, and ``numerics/skipped_steps``, their
    number so far, is logged. After ``patience`` of them in a row the run stops after all.
    """

    def __init__(
        self, is_saved: Callable[[State, Event], bool], skip: bool = False, patience: int = 10
    ) -> None:
        self.is_saved = is_saved
        self.skip = skip
        self.patience = patience
        self.skipped = 0
        self.in_a_row = 0
        self._watched: list[Watched] = []
        self._losses: dict[str, Tensor] = {}
        self._trained: list[Watched] = []
        self._norms = torch.zeros(0)

    def match(self, event: Event, state: State) -> bool:
        """Run around the backward pass, at the end of a step, and before a checkpoint."""
        events = {Event.FIT_START, Event.AFTER_TRAIN_BATCH, Event.BATCH_END, *CHECKPOINTS}
        return event in events or (self.skip and event == Event.AFTER_LOSS)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Measure, and judge."""
        if event == Event.FIT_START:
            model = getattr(state.model, "module", state.model)
            self._watched = watched_parameters(model, state.optimizers[0])
        elif event == Event.AFTER_LOSS:
            for name, value in state.loss.items():  # a sum is finite only if its terms are
                self._losses[name] = self._losses.get(name, 0.0) + value.detach()
        elif event == Event.AFTER_TRAIN_BATCH:
            self._measure_gradients(state)
            if self.skip:
                self._skip_if_broken(state, logger)
        elif event == Event.BATCH_END:
            self._judge(state)
        elif self.is_saved(state, event):
            self._judge_tensors(state, [w for w in self._watched if w.kind == "weight"])

    def _measure_gradients(self, state: State) -> None:
        # In half precision some overflow is normal: the scaler skips such steps itself.
        scaled = state.precision == Precision.AMP_FP16
        self._trained = [w for w in self._watched if w.parameter.grad is not None and not scaled]
        self._norms = compute_norms([w.parameter.grad for w in self._trained])

    def _broken_gradients(self) -> list[Broken]:
        return find_broken(self._trained, [w.parameter.grad for w in self._trained], self._norms)

    def _skip_if_broken(self, state: State, logger: Logger) -> None:
        names = sorted(self._losses)
        losses = torch.stack([self._losses[name].float().reshape(()) for name in names])
        norms = self._norms.to(losses.device)  # without any gradient they are on the host
        broken = torch.cat([~losses.isfinite(), ~(norms < LIMIT)]).int()
        # Gradients are those of all ranks already, losses are this rank's.
        dist.all_reduce(broken, reduce_operation="MAX")
        found = broken.bool().tolist()  # waits: the optimizer must not step before the answer
        self._losses = {}
        if not any(found):
            self.in_a_row = 0
            return
        what = describe_losses([name for name, bad in zip(names, found, strict=False) if bad])
        if not what:
            flags = zip(self._trained, found[len(names) :], strict=True)
            elsewhere = [(watched, math.nan) for watched, bad in flags if bad]
            what = describe("gradient", self._broken_gradients() or elsewhere)
        for watched in self._watched:
            watched.parameter.grad = None  # AdamW passes over it: no decay, no moment, no count
        self.skipped += 1
        self.in_a_row += 1
        logger.log_metrics({"numerics/skipped_steps": self.skipped})
        if dist.get_global_rank() == 0:
            text = "%s: %s. The step is skipped (optimizer.non_finite=skip), %d so far."
            log.warning(text, _where(state, ahead=1), what, self.skipped)

    def _judge(self, state: State) -> None:
        if self.in_a_row >= self.patience:
            raise RuntimeError(
                f"{_where(state)}: {self.in_a_row} steps in a row were skipped, because losses or "
                f"gradients are not finite. To fix, {LOWER_LR}. {KEPT}"
            )
        if self.in_a_row:  # this step was skipped
            return
        also = "" if self.skip else ", or skip such steps with optimizer.non_finite=skip"
        losses = {name.split("/")[-1]: value for name, value in state.total_loss_dict.items()}
        parts = sorted(name for name, value in losses.items() if not math.isfinite(value))
        if parts:
            raise RuntimeError(_message(state, describe_losses(parts), LOWER_LR + also))
        if broken := self._broken_gradients():
            advice = ADVICE[broken[0][0].kind] + also
            raise RuntimeError(_message(state, describe("gradient", broken), advice))
        self._judge_tensors(state, [w for w in self._watched if w.kind != "weight"])

    def _judge_tensors(self, state: State, watched: Sequence[Watched]) -> None:
        tensors = [w.parameter for w in watched]
        if broken := find_broken(watched, tensors, compute_norms(tensors)):
            raise RuntimeError(_message(state, describe("", broken), ADVICE[broken[0][0].kind]))

    def gradient_norms(self) -> dict[nn.Parameter, Tensor]:
        """Return the norms of this step's gradients; of a sharded tensor that of its own part."""
        return dict(zip((w.parameter for w in self._trained), self._norms.unbind(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the number of skipped steps."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume the count."""
        self.skipped = state["skipped"]


class Watched(NamedTuple):
    """A trained tensor: weight, gate or multiplier (``kind``), and its name in the model."""

    kind: str
    name: str
    parameter: nn.Parameter


# A tensor and its largest value.
Broken = tuple[Watched, float]


def watched_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Watched]:
    """List what an optimizer trains, in the order in which a backward pass is likely to break it.

    It goes through the model from its end, so that the tensor behind the broken operation comes
    before those that inherit its numbers. Gates inherit from all layers and come last. The groups
    of the optimizer are called ``weights/...``, ``gates`` or ``multipliers/...``.
    """
    kinds = {
        parameter: KINDS[group["name"].split("/")[0]]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    found = [Watched(kinds[p], name, p) for name, p in model.named_parameters() if p in kinds]
    found.reverse()
    return sorted(found, key=lambda w: list(KINDS.values()).index(w.kind))


@torch.no_grad()
def compute_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each tensor: shape ``(n,)``, float32, on their device.

    It is not below :data:`LIMIT` if one of the tensor's numbers is not. (torch finds the largest
    number many times more slowly than the norm.)
    """
    if not tensors:
        return torch.zeros(0)
    return torch.stack(
        [norm.float() for norm in torch._foreach_norm([own_numbers(t) for t in tensors])]
    )


def find_broken(
    watched: Sequence[Watched], tensors: Sequence[Tensor], norms: Tensor
) -> list[Broken]:
    """Find the tensors that are not finite or too large for AdamW.

    They are parameters or gradients, possibly clipped since their norms were measured.
    """
    norms = zip(watched, tensors, norms.tolist(), strict=True)
    return [(w, _largest(tensor, norm)) for w, tensor, norm in norms if not norm < LIMIT]


def _largest(tensor: Tensor, norm: float) -> float:
    """The largest absolute value, or the norm if the numbers have been clipped since."""
    value = float(own_numbers(tensor).detach().abs().max())
    return value if LIMIT <= value < math.inf else norm


def own_numbers(tensor: Tensor) -> Tensor:
    """A sharded tensor's part on this rank, or the rows of a table that have a gradient.

    So the rank that has a broken number stops.
    """
    if tensor.is_sparse:
        return tensor._values()  # in place, and summed by RowGradients already
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def describe(what: str, broken: Sequence[Broken]) -> str:
    """Describe the first of the broken tensors, and count the others.

    ``what`` is "gradient", or "" for the tensors themselves.
    """
    watched, value = broken[0]
    state = "is not finite" if not math.isfinite(value) else "is too large for AdamW"
    name = f"the {what} of {watched.kind}" if what else watched.kind
    others = len(broken) - 1
    more = f", and so {'is' if others == 1 else 'are'} {others} other tensor" if others else ""
    more += "s" if others > 1 else ""
    return f"{name} {watched.name} {state} ({value:.3g}){more}"


def describe_losses(parts: Sequence[str]) -> str:
    """Name the broken parts of the loss; the total only if no part is broken."""
    names = [name for name in parts if name != "total"] or list(parts)
    if len(names) == 1:
        return f"loss part {names[0]} is not finite"
    return f"loss parts {', '.join(names)} are not finite" if names else ""


def _where(state: State, ahead: int = 0) -> str:
    step = state.timestamp.batch.value + ahead
    return f"step {step}, source {state.batch.get('source', 'data')}"


def _message(state: State, what: str, advice: str) -> str:
    return f"{_where(state)}: {what}. To fix, {advice}. {KEPT}"
