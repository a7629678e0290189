"""What the clock of training does to the gates."""

import pytest
import torch
from composer.core import Event, State, Time, Timestamp
from composer.devices import DeviceCPU

from bge_pruning.algorithms.pruning_schedule import (
    PruningSchedule,
    compute_binarization_progress,
    compute_progress,
)
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.models.encoder_shape import EncoderShape
from bge_pruning.models.hard_concrete import LOG_ALPHA_MAX, LOG_ALPHA_MIN
from bge_pruning.models.l0_module_embedding import L0Module

SHAPE = EncoderShape(32, 4, 4, 64, 99, head_dim=8)


@pytest.fixture
def l0_module() -> L0Module:
    """Gates that are to keep half of the encoder's parameters or so."""
    return L0Module(SHAPE, ["layer", "intermediate"], target_parameters=18_000)


@pytest.fixture
def make_state():

    def make(batch: int = 0, max_duration: str | None = "10ba") -> State:
        model = torch.nn.Linear(1, 1)
        state = State(model, 0, "run", DeviceCPU(), max_duration=max_duration)
        state.timestamp = Timestamp(batch=batch)
        return state

    return make


@pytest.mark.parametrize(
    ("warmup", "progress"),
    [
        ("4ba", [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ("0.5dur", [0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1]),
        ("1dur", [n / 10 for n in range(10)]),
        *[(f"0{unit}", [1] * 10) for unit in ("ba", "ep", "dur")],
    ],
)
def test_progress_is_the_share_of_the_warm_up(warmup, progress, make_state):
    found = [compute_progress(make_state(n), Time.from_timestring(warmup)) for n in range(10)]
    assert found == pytest.approx(progress, abs=1e-12)


@pytest.mark.parametrize(
    ("warmup", "batches"),
    [
        ("4ba", [0.0] * 5 + [0.2, 0.4, 0.6, 0.8, 1.0]),
        ("9ba", [0.0] * 9 + [1.0]),
        ("1dur", [0.0] * 10),
    ],
)
def test_gates_decide_after_the_warm_up(warmup, batches, make_state):
    found = [
        compute_binarization_progress(make_state(batch), Time.from_timestring(warmup))
        for batch in range(10)
    ]
    assert found == pytest.approx(batches)


def test_step_and_progress_follow_the_clock_and_batches_end_with_a_clamp(l0_module, make_state):
    schedule = PruningSchedule(l0_module, "8ba")
    matched = {event for event in Event if schedule.match(event, make_state())}
    assert matched == {Event.BATCH_START, Event.BATCH_END}
    with torch.no_grad():
        l0_module.log_alpha["layer"][:2] = torch.tensor([50.0, -50.0])
        l0_module.log_alpha["intermediate"][1, 2] = 50.0
    before = l0_module.log_alpha["intermediate"].detach().clone()
    for batch in (6, 2, 3):  # also backwards: nothing but the clock counts
        schedule.apply(Event.BATCH_START, make_state(batch), None)
        assert l0_module.step == batch
        assert l0_module.warmup_progress == batch / 8
        assert l0_module.binarization_progress == 0.0
    assert l0_module.log_alpha["layer"][0] == 50.0
    schedule.apply(Event.BATCH_END, make_state(4), None)
    layer = l0_module.log_alpha["layer"].detach()
    assert layer[:2].tolist() == pytest.approx([LOG_ALPHA_MAX, LOG_ALPHA_MIN])
    assert torch.equal(l0_module.log_alpha["intermediate"], before.clamp(max=LOG_ALPHA_MAX))
    assert (l0_module.step, l0_module.warmup_progress) == (3, 0.375)


def test_a_warm_up_in_a_unit_that_cannot_be_counted_is_refused(l0_module, make_state):
    message = "time 3tok is not in ba, ep or dur. To fix, use one of these units."
    with pytest.raises(ValueError, match=message):
        PruningSchedule(l0_module, "3tok").apply(Event.BATCH_START, make_state(1), None)


@pytest.fixture
def seen(monkeypatch) -> list[tuple[int, float, torch.Tensor]]:
    seen = []
    forward = ComposerBGEM3.forward

    def watch(self, batch):
        if self.training:
            gates = self.l0_module
            seen.append((gates.step, gates.warmup_progress, gates.sample_masks().hidden))
        return forward(self, batch)

    monkeypatch.setattr(ComposerBGEM3, "forward", watch)
    return seen


def test_every_step_of_training_has_its_own_noise_and_target(tmp_path, train_tiny, seen):
    sizes = ("device_train_microbatch_size=4", "loss.distillation_similarity=0")
    train_tiny(tmp_path, "max_duration=4ba", *sizes)
    clock = [(step, progress) for step, progress, _ in seen]
    assert clock == [(n, p) for n, p in enumerate((0.0, 0.5, 1.0, 1.0)) for _ in range(2)]
    for (_, _, first), (_, _, second) in zip(seen[::2], seen[1::2], strict=True):
        assert torch.equal(first, second)  # the microbatches of a step
    assert not torch.equal(seen[0][2], seen[2][2])


def test_checkpoints_are_written_after_clamping(tmp_path, train_tiny, load_state):
    # Composer's learning rate of the first two steps is 0; the third moves every gate by about 50.
    run = train_tiny(tmp_path, "max_duration=3ba", "optimizer.l0_lr=50", "save_interval=1ba")
    for name, moved in (("ba2-rank0.pt", False), ("ba3-rank0.pt", True)):
        state = load_state(run / name)["model"]
        gates = torch.cat([v.flatten() for k, v in state.items() if "log_alpha" in k])
        assert torch.equal(gates, gates.clamp(LOG_ALPHA_MIN, LOG_ALPHA_MAX))
        ends = torch.tensor([LOG_ALPHA_MIN, LOG_ALPHA_MAX])
        assert torch.isin(gates, ends).any() == moved
