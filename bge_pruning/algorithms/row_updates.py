"""AdamW that touches the rows of a table of words that a step needs, not all 250,000.

A step of 900 tokens has a gradient for at most 900 rows. A table whose ``sparse`` is true gets its
gradient as these rows and their numbers; clipping and the search for broken numbers read only
them. What AdamW does to the others, with their gradient ``g = 0`` and no weight decay, is

``m <- b1 m``, ``v <- b2 v``, ``w <- w - lr m^ / (sqrt(v^) + eps)``.

A row that never was in a batch has ``m = v = 0``: it stays as it is, exactly, and has no moments
here. A row that was goes on moving, and these later moves are most of what a rare token learns:
they shrink by ``r = b1 / sqrt(b2)`` a step, so all of them together are ``1 / (1 - r)`` times the
first, 11 times with b1 = 0.9 and b2 = 0.98. ``torch.optim.SparseAdam`` leaves them out, so that a
rare token learns a tenth. Here a row stays *moving* for ``n`` steps after its last batch, until
``r^n <= 1e-6``: 146 steps with these betas. What is left out of its moves is a millionth of them,
below what float32 keeps. When the row comes again after ``k`` steps more, its moments are first
multiplied by ``b1^k`` and ``b2^k``, as if it had been updated all the time. So the table is at
every moment, also in a checkpoint, that of AdamW on all rows to within rounding.

With ``r >= 1`` the moves do not shrink, and a row that was in a batch is moving for ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

# What may be left out of the later moves of a row, as a share of them.
LEFT_OUT = 1e-6
# Moments get room for as many rows more at once, or for an eighth more.
ROOM = 1024
# Rows that go on moving are copied in blocks: the copies of all would take more than a gradient.
BLOCK = 16_384
MOMENTS = ("exp_avg", "exp_avg_sq")
# More steps than any run has.
FOR_EVER = 10**9


class RowGradients(Algorithm):
    """Sums the gradients of equal rows, and takes the mean over the ranks, before it is clipped.

    Each rank has other rows. DDP passes over such tables
    (:meth:`bge_pruning.models.composer_bge_m3.ComposerBGEM3.update_drawn_rows`), and here every
    rank gets the rows of all of them, in the same order: all tables stay the same to the bit.
    """

    def match(self, event: Event, state: State) -> bool:
        """After the backward pass, before the optimizer step."""
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Sum, and average."""
        for group in state.optimizers[0].param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    parameter.grad = _mean_over_ranks(parameter.grad.coalesce())


def _mean_over_ranks(gradient: Tensor) -> Tensor:
    ranks = dist.get_world_size()
    if ranks == 1:
        return gradient
    rows, values = gradient.indices()[0], gradient.values()
    counts = torch.zeros(ranks, dtype=torch.long, device=rows.device)
    counts[dist.get_global_rank()] = len(rows)
    dist.all_reduce(counts)
    sizes = counts.tolist()
    padding = max(sizes) - len(rows)  # messages must be of one size
    gathered = [
        torch.cat([part[:size] for part, size in zip(dist.all_gather(message), sizes, strict=True)])
        for message in (
            torch.cat([rows, rows.new_zeros(padding)]),
            torch.cat([values, values.new_zeros(padding, values.shape[1])]),
        )
    ]
    whole = torch.sparse_coo_tensor(gathered[0][None], gathered[1] / ranks, gradient.shape)
    return whole.coalesce()


class AdamW(torch.optim.AdamW):
    """torch's AdamW, with moments of the drawn rows only for tables, see the module.

    A table's state: ``rows`` ``(R,)`` that have moments, -1 where there is room for more; the step
    in which each was drawn ``last``; and its ``exp_avg`` and ``exp_avg_sq`` ``(R, H)``.

    Args:
        tables: Parameters of shape ``(V, H)`` among those of the groups.

    Raises:
        ValueError: If a table has weight decay, which would have to reach every row.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], tables: Iterable[nn.Parameter] = (), **options: Any
    ) -> None:
        super().__init__(groups, **options)
        self.tables = frozenset(tables)
        # Where in a table's state each of its rows is, shape (V,); -1: nowhere.
        self._places: dict[nn.Parameter, Tensor] = {}
        # Hidden from torch's update, which refuses them.
        self._gradients: dict[nn.Parameter, Tensor] = {}
        for group in self.param_groups:
            if group["weight_decay"] and not self.tables.isdisjoint(group["params"]):
                raise ValueError(
                    f"group {group.get('name', '')!r} has weight decay and a table that is updated "
                    f"by rows. To fix, put the table into a group without weight decay."
                )
        self.register_step_pre_hook(_update_after_closure)
        self.register_step_post_hook(AdamW.show_gradients)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load; of moments of all rows, as older checkpoints have them, those of drawn rows.

        Raises:
            ValueError: If there are moments of drawn rows of what is no table here.
        """
        super().load_state_dict(state_dict)
        if any("rows" in state for other, state in self.state.items() if other not in self.tables):
            raise ValueError(
                "the checkpoint has moments of the words that were in a batch, and a sharded table "
                "needs those of all. To fix, resume with parallelism.fsdp=false, as it began."
            )
        self._places = {}
        for table in self.tables:
            state = self.state.get(table, {})
            if "exp_avg" in state and "rows" not in state:
                rows = state["exp_avg_sq"].any(dim=1).nonzero()[:, 0]
                state["rows"], state["last"] = rows, state["step"].expand(len(rows)).clone()
                state |= {name: state[name][rows] for name in MOMENTS}
            elif state:
                state["rows"] = state["rows"].long()  # torch loads all state as the table's type

    @torch.no_grad()
    def update_tables(self) -> None:
        """Update what has gradients among the tables, and hide these gradients."""
        for group in self.param_groups:
            for table in self.tables.intersection(group["params"]):
                if table.grad is not None:
                    self._update_rows(group, table)
                    self._gradients[table], table.grad = table.grad, None

    def show_gradients(self, *_: Any) -> None:
        """Undo the hiding."""
        for table, gradient in self._gradients.items():
            table.grad = gradient
        self._gradients = {}

    def _update_rows(self, group: dict[str, Any], table: nn.Parameter) -> None:
        gradient = table.grad if table.grad.is_sparse else table.grad.to_sparse(1)
        gradient = gradient.coalesce()
        drawn = self._find_places(table, gradient.indices()[0])
        state, before = self.state[table], self.state[table]["last"]
        steps, now = count_moving_steps(*group["betas"]), state["step"] + 1
        state["last"] = before.index_copy(0, drawn, now.expand(len(drawn)))
        moving = (now - state["last"] < steps) & (state["last"] != now)
        # Steps in which a row that comes again was not updated; a new row has no moments.
        missed = (now - before[drawn] - steps).clamp_(min=0).unsqueeze(1)
        for name, beta in zip(MOMENTS, group["betas"], strict=True):
            state[name].index_copy_(0, drawn, state[name][drawn] * beta**missed)
        done = self._update(group, table, drawn, gradient.values())
        for places in moving.nonzero()[:, 0].split(BLOCK):
            self._update(group, table, places, table.new_zeros(len(places), table.shape[1]))
        state["step"] = done

    def _update(
        self, group: dict[str, Any], table: nn.Parameter, places: Tensor, gradient: Tensor
    ) -> Tensor:
        """Update copies of rows by torch's AdamW, and write them back; returns the next step."""
        state, step = self.state[table], self.state[table]["step"].clone()
        rows = state["rows"][places]
        weights, moments = table[rows], [state[name][places] for name in MOMENTS]
        adamw(
            [weights],
            [gradient],
            *([moment] for moment in moments),
            [],
            [step],
            fused=group["fused"],
            # Of a scaler of half precision, which skips the steps in which something overflowed.
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            maximize=group["maximize"],
            **{name: group[name] for name in ("lr", "weight_decay", "eps")},
        )
        table.index_copy_(0, rows, weights)
        for name, moment in zip(MOMENTS, moments, strict=True):
            state[name].index_copy_(0, places, moment)
        return step

    def _find_places(self, table: nn.Parameter, rows: Tensor) -> Tensor:
        """Where the state of rows is, shape ``(U,)``; new rows get a place."""
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros((), device=table.device)
            state["rows"] = torch.empty(0, dtype=torch.long, device=table.device)
            state["last"] = torch.empty(0, device=table.device)
            state["exp_avg"] = state["exp_avg_sq"] = table.new_empty(0, table.shape[1])
        known = (state["rows"] >= 0).nonzero()[:, 0]
        if table not in self._places:
            self._places[table] = torch.full((len(table),), -1, device=table.device)
            self._places[table][state["rows"][known]] = known
        places, used = self._places[table], len(known)
        new = rows[places[rows] < 0]
        self._make_room(state, used + len(new), len(table))
        state["rows"][used : used + len(new)] = new
        places[new] = torch.arange(used, used + len(new), device=table.device)
        return places[rows]

    def _make_room(self, state: dict[str, Tensor], needed: int, most: int) -> None:
        size = len(state["rows"])
        if needed <= size:
            return
        more = min(max(needed - size, ROOM, size // 8), most - size)
        empty = {"rows": -1, "last": -math.inf, "exp_avg": 0.0, "exp_avg_sq": 0.0}
        for name, value in empty.items():
            old = state[name]
            state[name] = torch.cat([old, old.new_full((more, *old.shape[1:]), value)])


def _update_after_closure(
    optimizer: AdamW, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Update the tables once there are gradients: the trainer's closure computes them in a step."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")

    def compute() -> Any:
        loss = None if closure is None else closure()
        optimizer.update_tables()
        return loss

    return args[:1], {"closure": compute}


def count_moving_steps(beta1: float, beta2: float) -> int:
    """Steps from a row's last batch on in which AdamW moves it, see the module."""
    ratio = beta1 / math.sqrt(beta2) if beta2 else math.inf
    if ratio == 0:
        return 1
    return FOR_EVER if ratio >= 1 else math.ceil(math.log(LEFT_OUT) / math.log(ratio))
