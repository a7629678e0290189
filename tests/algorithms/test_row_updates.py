"""Tables that are updated by rows: the numbers of AdamW on all rows, without touching all."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer.core import Event
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bge_pruning.algorithms import row_updates
from bge_pruning.algorithms.gradient_groups import clip_norm_
from bge_pruning.algorithms.non_finite import compute_norms
from bge_pruning.algorithms.row_updates import AdamW, RowGradients, count_moving_steps
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.objective import LossWeights
from bge_pruning.models.structural_pruning import AXES
from bge_pruning.training.optimization import weight_groups
from tests.common.trainings import losses

BETAS = (0.9, 0.98)
ROWS, SIZE = 300, 8


class Table:
    """A table of words that learns random numbers, by rows or as a whole."""

    def __init__(self, by_rows: bool, betas: tuple[float, float] = BETAS) -> None:
        weights = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(0))
        self.words = nn.Embedding.from_pretrained(weights, freeze=False, sparse=by_rows)
        groups = [{"name": "weights", "params": [self.words.weight], "weight_decay": 0.0}]
        options = {"lr": 1e-2, "betas": betas, "fused": True}
        tables = [self.words.weight] if by_rows else []
        self.optimizer = AdamW(groups, tables, **options)
        self.betas = betas

    def step(self, *parts: torch.Tensor) -> torch.Tensor:
        """Draw rows, as many times as there are parts; returns the norm of the gradient."""
        for ids in parts:
            generator = torch.Generator().manual_seed(int(ids.sum()))
            goal = torch.randn(len(ids), SIZE, generator=generator)
            ((self.words(ids) - goal) ** 2).mean().backward()
        state = SimpleNamespace(optimizers=[self.optimizer])
        RowGradients().apply(Event.AFTER_TRAIN_BATCH, state, None)
        (norm,) = compute_norms([self.words.weight.grad])
        clip_norm_([self.words.weight], 0.2, {self.words.weight: norm})
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    @property
    def weight(self) -> torch.Tensor:
        return self.words.weight.detach().clone()

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return self.optimizer.state[self.words.weight]


def draw(step: int) -> list[torch.Tensor]:
    """Two parts of a batch, with some rows often, some rarely, and some for a while not at all."""
    generator = torch.Generator().manual_seed(step)
    ids = (torch.rand(2, 4, generator=generator) ** 3 * ROWS).long()
    return [*(ids % 20 if 60 < step < 260 else ids)]


def test_where_all_rows_are_drawn_the_numbers_are_adamws_bit_for_bit():
    whole, rows = Table(False), Table(True)
    for _ in range(20):
        order = torch.randperm(ROWS)
        for table in (whole, rows):
            table.step(order[:200], order[150:])
    assert torch.equal(whole.weight, rows.weight)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(rows.state[name], whole.state[name][rows.state["rows"]])


@pytest.mark.parametrize("betas", [BETAS, (0.9, 0.999), (0.9, 0.8), (0.0, 0.9), (0.0, 0.0)])
def test_rarely_drawn_rows_move_as_those_of_adamw_on_all_rows(betas):
    """They go on moving after their batch, and come back with older moments."""
    start, whole, rows = Table(True).weight, Table(False, betas), Table(True, betas)
    for step in range(400):
        norms = [table.step(*draw(step)) for table in (whole, rows)]
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=0)
        torch.testing.assert_close(whole.weight, rows.weight, rtol=1e-6, atol=2e-6)
    drawn = torch.zeros(ROWS, dtype=torch.bool)
    drawn[torch.cat([ids for step in range(400) for ids in draw(step)])] = True
    moved = (rows.weight != start).any(1)
    assert torch.equal(moved, drawn) and 20 < drawn.sum() < ROWS


def test_how_long_a_row_moves():
    assert count_moving_steps(0.9, 0.98) == 146
    assert count_moving_steps(0.0, 0.98) == 1
    assert count_moving_steps(0.9, 0.81) == count_moving_steps(0.0, 0.0) == row_updates.FOR_EVER


def test_only_drawn_rows_have_moments(monkeypatch):
    monkeypatch.setattr(row_updates, "ROOM", 4)
    table, drawn = Table(True), set()
    for ids in ([5, 7, 5], [7], [250, 1, 2, 3, 4]):
        table.step(torch.tensor(ids))
        drawn |= set(ids)
        rows = table.state["rows"]
        assert sorted(rows[rows >= 0].tolist()) == sorted(drawn)
        assert len(rows) - len(drawn) <= 4
        assert len(table.state["exp_avg"]) == len(table.state["last"]) == len(rows)


@pytest.mark.parametrize("resumed", [True, False], ids=["its own state", "moments of all rows"])
def test_a_resumed_table_goes_on_bit_for_bit(resumed):
    source, again, whole = Table(resumed), Table(True), Table(resumed)
    for step in range(80):
        source.step(*draw(step))
        whole.step(*draw(step))
    again.words.load_state_dict(source.words.state_dict())
    again.optimizer.load_state_dict(source.optimizer.state_dict())
    for step in range(80, 280):
        again.step(*draw(step))
        whole.step(*draw(step))
    torch.testing.assert_close(again.weight, whole.weight, rtol=0, atol=0 if resumed else 2e-6)
    assert (again.state["rows"] >= 0).sum() < ROWS


def test_moments_of_drawn_rows_are_not_loaded_for_a_whole_table():
    table = Table(True)
    table.step(torch.tensor([5, 7]))
    with pytest.raises(ValueError, match=r"sharded table .* To fix, .*parallelism\.fsdp=false"):
        Table(False).optimizer.load_state_dict(table.optimizer.state_dict())


def test_a_step_without_a_gradient_and_one_without_rows_move_no_new_row():
    """The first is a step that is skipped; with the second torch makes the state to load into."""
    table = Table(True)
    before = table.weight
    table.optimizer.step()
    assert not table.optimizer.state
    table.words.weight.grad = torch.zeros(ROWS, SIZE)
    table.optimizer.step()
    assert torch.equal(table.weight, before)
    assert table.state["step"] == 1 and len(table.state["rows"]) == 0


def test_weight_decay_of_a_table_is_refused():
    table = nn.Parameter(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"group 'all' has weight decay and a table .* To fix"):
        AdamW([{"name": "all", "params": [table], "weight_decay": 0.1}], [table])


def test_the_gradient_is_the_mean_over_the_ranks(monkeypatch):
    """The other rank has other rows, and more of them."""
    other = torch.sparse_coo_tensor([[2, 4, 0]], torch.tensor([[3.0], [4.0], [8.0]]), (6, 1))
    other = other.coalesce()

    def gather(message: torch.Tensor) -> list[torch.Tensor]:
        return [message, other.values() if message.is_floating_point() else other.indices()[0]]

    monkeypatch.setattr(row_updates.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(row_updates.dist, "get_global_rank", lambda: 0)
    monkeypatch.setattr(row_updates.dist, "all_reduce", lambda counts: counts[1:].fill_(3))
    monkeypatch.setattr(row_updates.dist, "all_gather", gather)
    table = nn.Parameter(torch.zeros(6, 1))
    table.grad = torch.sparse_coo_tensor([[4, 1, 4]], torch.tensor([[1.0], [2.0], [5.0]]), (6, 1))
    state = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[{"params": [table]}])])
    RowGradients().apply(Event.AFTER_TRAIN_BATCH, state, None)
    assert table.grad.is_coalesced()
    assert table.grad.to_dense()[:, 0].tolist() == [4.0, 1.0, 1.5, 0.0, 5.0, 0.0]


class NoWholeTable(TorchDispatchMode):
    """Fails at an operation that makes something as large as the table."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [a.untyped_storage().data_ptr() for a in args if is_dense(a)]
        for result in made if isinstance(made, (tuple, list)) else [made]:
            if is_dense(result) and result.numel() >= 20_000 * SIZE:
                assert result.untyped_storage().data_ptr() in given, f"{func} makes a table"
        return made


def is_dense(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("gated", [True, False], ids=["gates", "no gates"])
@pytest.mark.parametrize("chunk_size", [None, 1], ids=["whole", "pieces"])
def test_a_step_makes_nothing_as_large_as_the_table(chunk_size, gated, frozen, build_model):
    shape = EncoderShape(SIZE, 2, 2, 16, 20_000, 4, 40)
    target = EncoderShape(4, 1, 1, 8, 20_000, 4, 40)
    gates = L0Module(shape, AXES, target, seed=0) if gated else None
    parts, weights = build_model(shape, torch.float32), LossWeights(distillation_alignment=1.0)
    model = ComposerBGEM3(*parts, gates, weights, chunk_size=chunk_size).train()
    embeddings = model.backbone.embeddings
    if frozen:
        embeddings.freeze_tables()
    model.update_drawn_rows()
    optimizer = AdamW(weight_groups([model.backbone, model.heads], 1e-3, 0.01), model.row_tables())
    words, before = embeddings.word_embeddings.weight, embeddings.word_embeddings.weight.clone()
    ids = torch.tensor([[[0, 5, 6, 2]], [[0, 19_999, 5, 2]]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["teacher_dense_vecs"] = torch.nn.functional.normalize(torch.ones(2, 1, SIZE), dim=-1)
    state = SimpleNamespace(optimizers=[optimizer])
    with NoWholeTable():
        for _ in range(2):
            model.loss(model(batch), batch)["total"].backward()
            RowGradients().apply(Event.AFTER_TRAIN_BATCH, state, None)
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            clip_norm_([p for p in trained if p.grad is not None], 1.0, {})
            optimizer.step()
            optimizer.zero_grad()
    changed = (words != before).any(1).nonzero()[:, 0].tolist()
    assert changed == ([] if frozen else [0, 2, 5, 6, 19_999])
    tables = {table.weight for table in embeddings.tables()}
    assert tables.isdisjoint(optimizer.state) == tables.isdisjoint(trained) == frozen
    assert all(table.grad is None for table in tables)


@pytest.mark.parametrize(
    "settings",
    [
        ("device_train_microbatch_size=2", "loss.distillation_similarity=0"),
        ("device_train_microbatch_size=2", "optimizer.max_grad_norm=1e-2"),
        ("precision=amp_bf16", "model.activation_checkpointing=true"),
    ],
    ids=["microbatches", "pieces, clipped", "bf16, computed again"],
)
def test_a_run_is_that_of_a_whole_table(settings, tmp_path, train_tiny, load_state, monkeypatch):
    steps = ("max_duration=5ba", "save_interval=5ba", "data.eval=[]", "optimizer.eps=1e-4")
    by_rows = train_tiny(tmp_path / "rows", *steps, *settings)
    monkeypatch.setattr(ComposerBGEM3, "update_drawn_rows", lambda _: None)
    whole = train_tiny(tmp_path / "whole", *steps, *settings)
    assert losses(by_rows) == pytest.approx(losses(whole), rel=1e-5)
    found, expected = (load_state(run)["model"] for run in (by_rows, whole))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=name)
