"""Notices losses, gradients, weights and gates that are no numbers, in the step they arise in."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import Algorithm, Event, Precision, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

log = logging.getLogger(__name__)

# AdamW stores squares: that of a larger number is infinite, and its parameter would stand still.
LIMIT = math.sqrt(torch.finfo(torch.float32).max)
CHECKPOINTS = {Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT}
KINDS = {"weights": "weight", "gates": "gate", "multipliers": "multiplier"}
ADVICE = {
    "loss part": "lower optimizer.lr or look for broken texts in that source",
    "weight": "lower optimizer.lr or look for broken texts in that source",
    "gate": "lower optimizer.l0_lr",
    "multiplier": "lower optimizer.lagrangian_lr and optimizer.lambda_2_lr",
}


class NonFiniteGuard(Algorithm):
    """Stops the run at a number that is none, or leaves out the step that would spread it.

    Looked at in every step: the parts of the loss, the gradient of every trained tensor as the
    backward pass left it, and gates and multipliers after the optimizer's step. Weights, which are
    many, are looked at before a checkpoint of them is written: the last good one stays.

    To stop, nothing more is waited for than the losses, which the trainer fetches in every step:
    the norms are on their way to the host before them. To skip, the host has to know before the
    optimizer steps, and waits for the backward pass. All ranks decide alike.

    ============================  ================================================================
    key                           value
    ============================  ================================================================
    ``numerics/skipped_steps``    steps left out so far, logged when there is one more
    ============================  ================================================================

    It has to look before gradients are clipped, which spreads one broken number to all of them;
    clipping then takes the norms from here.

    Args:
        is_saved: Whether a checkpoint is written at an event.
        skip: Leave out the optimizer's step of a batch with a broken loss or gradient. Weights,
            gates, multipliers and AdamW's moments stay as they are.
        patience: Steps left out in a row at which the run stops after all.

    Raises:
        RuntimeError: At the end of the step, before a checkpoint of it is written.
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
        self._gradients: Reading | None = None
        self._parameters: Reading | None = None
        self._hook: RemovableHandle | None = None

    def match(self, event: Event, state: State) -> bool:
        """Around the backward pass, at the end of a step, and before a checkpoint."""
        events = {Event.FIT_START, Event.AFTER_TRAIN_BATCH, Event.BATCH_END, Event.FIT_END}
        return event in events | CHECKPOINTS or (self.skip and event == Event.AFTER_LOSS)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Collect, and judge."""
        if event == Event.FIT_START:
            self._watch(state)
        elif event == Event.AFTER_LOSS:
            self._add_losses(state.loss)
        elif event == Event.AFTER_TRAIN_BATCH:
            self._read_gradients(state, logger)
        elif event == Event.BATCH_END:
            self._judge(state)
        elif event in CHECKPOINTS:
            if self.is_saved(state, event):
                self._judge_weights(state)
        elif self._hook is not None:
            self._hook.remove()

    def _watch(self, state: State) -> None:
        self._watched = watched_parameters(
            getattr(state.model, "module", state.model), state.optimizers[0]
        )
        # Between the step and the fetching of the losses; inside of it the closure has run.
        self._hook = state.optimizers[0].register_step_post_hook(self._read_parameters)

    def _read_parameters(self, *_: object) -> None:
        few = [watched for watched in self._watched if watched.kind != "weight"]
        self._parameters = Reading(few, [watched.parameter for watched in few])

    def _add_losses(self, losses: dict[str, Tensor]) -> None:
        """Of a microbatch; a sum is finite only if its terms are."""
        for name, value in losses.items():
            self._losses[name] = self._losses.get(name, 0.0) + value.detach()

    def _read_gradients(self, state: State, logger: Logger) -> None:
        # In half precision some overflow is normal: the scaler leaves such steps out and lowers
        # its factor.
        scaled = state.precision == Precision.AMP_FP16
        trained = [w for w in self._watched if w.parameter.grad is not None and not scaled]
        self._gradients = Reading(trained, [w.parameter.grad for w in trained])
        if self.skip:
            self._leave_out_if_broken(state, logger)

    def _leave_out_if_broken(self, state: State, logger: Logger) -> None:
        names = sorted(self._losses)
        losses = torch.stack([self._losses[name].float().reshape(()) for name in names])
        gradients = self._gradients.values.to(losses.device)  # of none they are on the host
        broken = torch.cat([~losses.isfinite(), ~(gradients < LIMIT)]).int()
        # Gradients are those of all ranks already, losses are this rank's.
        dist.all_reduce(broken, reduce_operation="MAX")
        found = broken.bool().tolist()  # waits: the optimizer must not step before the answer
        self._losses = {}
        if not any(found):
            self.in_a_row = 0
            return
        for watched in self._watched:
            watched.parameter.grad = None  # AdamW passes over it: no decay, no moment, no count
        self.skipped += 1
        self.in_a_row += 1
        logger.log_metrics({"numerics/skipped_steps": self.skipped})
        if dist.get_global_rank() == 0:
            parts = [name for name, bad in zip(names, found, strict=False) if bad]
            what = describe_losses(parts) or describe("gradient", self._gradients.broken())
            log.warning(
                "%s: %s. The step is left out (optimizer.non_finite=skip), %d so far.",
                *(_where(state, ahead=1), what, self.skipped),
            )

    def _judge(self, state: State) -> None:
        if self.in_a_row:  # this step was left out
            if self.in_a_row >= self.patience:
                raise RuntimeError(
                    f"{_where(state)}: {self.in_a_row} steps in a row were left out, because "
                    f"losses or gradients are not finite. To fix, {ADVICE['loss part']}. {KEPT}"
                )
            return
        losses = {name.split("/")[-1]: value for name, value in state.total_loss_dict.items()}
        parts = sorted(name for name, value in losses.items() if not math.isfinite(value))
        if parts:
            raise RuntimeError(_message(state, describe_losses(parts), "loss part", not self.skip))
        for what, reading in (("gradient", self._gradients), ("", self._parameters)):
            broken = [] if reading is None else reading.broken()
            if broken:
                kind = broken[0][0].kind
                skippable = what == "gradient" and not self.skip
                raise RuntimeError(_message(state, describe(what, broken), kind, skippable))

    def _judge_weights(self, state: State) -> None:
        weights = [watched for watched in self._watched if watched.kind == "weight"]
        if broken := Reading(weights, [watched.parameter for watched in weights]).broken():
            raise RuntimeError(_message(state, describe("", broken), "weight", skippable=False))

    def gradient_norms(self) -> dict[nn.Parameter, Tensor]:
        """Norms of this step's gradients; of a sharded tensor that of this rank's part."""
        read = self._gradients
        if read is None:
            return {}
        return dict(zip((w.parameter for w in read.watched), read.values.unbind(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """How many steps were left out."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped = state["skipped"]


@dataclass(frozen=True)
class Watched:
    """A trained tensor.

    Attributes:
        kind: weight, gate or multiplier.
        name: In the model.
        parameter: The tensor.
    """

    kind: str
    name: str
    parameter: nn.Parameter


def watched_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Watched]:
    """What an optimizer trains, in the order in which a backward pass is likely to break it.

    It goes through the model from its end, so that the tensor behind the broken operation comes
    before those that inherit its numbers. Gates inherit from all layers and come last.

    Args:
        model: Whose names the tensors have.
        optimizer: With groups called ``weights/...``, ``gates`` or ``multipliers/...``.
    """
    kinds = {
        parameter: KINDS[group["name"].split("/")[0]]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    found = [Watched(kinds[p], name, p) for name, p in model.named_parameters() if p in kinds]
    found.reverse()
    return sorted(found, key=lambda w: list(KINDS.values()).index(w.kind))


class Reading:
    """The norm of each tensor, on its way to the host.

    It is not below the limit if one of the tensor's numbers is not. (torch finds the largest
    number many times more slowly than the norm.)

    Args:
        watched: Whose tensors they are.
        tensors: As many, on one device.
    """

    def __init__(self, watched: Sequence[Watched], tensors: Sequence[Tensor]) -> None:
        self.watched = watched
        self.tensors = list(tensors)
        self.values = compute_norms(self.tensors)
        self._host = self.values.to("cpu", non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if self.values.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def broken(self) -> list[tuple[Watched, float]]:
        """Tensors with values that are no numbers or too large, and the largest value of each.

        Waits for nothing once the host has fetched anything that was computed later.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        norms = zip(self.watched, self.tensors, self._host.tolist(), strict=True)
        return [
            (watched, _largest(tensor, norm)) for watched, tensor, norm in norms if not norm < LIMIT
        ]


@torch.no_grad()
def compute_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each tensor: shape ``(n,)``, float32."""
    if not tensors:
        return torch.zeros(0)
    return torch.stack([norm.float() for norm in torch._foreach_norm([_own(t) for t in tensors])])


def _largest(tensor: Tensor, norm: float) -> float:
    """The largest absolute value, or the norm if the numbers have been clipped since."""
    value = float(_own(tensor).detach().abs().max())
    return value if LIMIT <= value < math.inf else norm


def _own(tensor: Tensor) -> Tensor:
    """Of a sharded tensor this rank's part: the rank that has the broken number stops."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def describe(what: str, broken: Sequence[tuple[Watched, float]]) -> str:
    """The first of the broken tensors, and how many more there are.

    Args:
        what: "gradient", or "" for the tensors themselves.
        broken: In the order of :func:`watched_parameters`; "" if there are none.
    """
    if not broken:
        return ""
    watched, value = broken[0]
    state = "is not finite" if not math.isfinite(value) else "is too large for AdamW"
    name = f"the {what} of {watched.kind}" if what else watched.kind
    others = len(broken) - 1
    more = f", and so {'is' if others == 1 else 'are'} {others} other tensor" if others else ""
    more += "s" if others > 1 else ""
    return f"{name} {watched.name} {state} ({value:.3g}){more}"


def describe_losses(parts: Sequence[str]) -> str:
    """Broken parts of the loss; the total only if no part is."""
    names = [name for name in parts if name != "total"] or list(parts)
    if len(names) == 1:
        return f"loss part {names[0]} is not finite"
    return f"loss parts {', '.join(names)} are not finite" if names else ""


KEPT = "The last checkpoint is kept, and autoresume=true goes on from it."


def _where(state: State, ahead: int = 0) -> str:
    step = state.timestamp.batch.value + ahead
    return f"step {step}, source {state.batch.get('source', 'data')}"


def _message(state: State, what: str, kind: str, skippable: bool) -> str:
    also = ", or leave such steps out with optimizer.non_finite=skip" if skippable else ""
    return f"{_where(state)}: {what}. To fix, {ADVICE[kind]}{also}. {KEPT}"
