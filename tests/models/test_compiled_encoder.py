"""The compiled encoder: one graph, whatever the gates are, and the numbers of the plain one."""

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.objective import LossWeights
from bge_pruning.models.structural_pruning import AXES

# torch's own compiler does so with every autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")

WEIGHTS = LossWeights(distillation_alignment=1.0, distillation_similarity=1.0)


def batch_of(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(4, 99, mask.shape, generator=generator)
    vectors = torch.randn(len(lengths), 1, 32, generator=generator)
    return {
        "input_ids": torch.where(mask.bool(), ids, 1)[:, None],
        "attention_mask": mask[:, None],
        "lengths": [[n] for n in lengths],
        "teacher_dense_vecs": torch.nn.functional.normalize(vectors, dim=-1),
    }


@pytest.fixture
def model(build_model, tiny_shape, target_shape) -> ComposerBGEM3:
    gates = L0Module(tiny_shape, AXES, target_shape, init_mean=0.5, init_std=1.0, seed=2)
    gates.warmup_progress = 0.5
    parts = build_model(tiny_shape, torch.float32, seed=1)
    torch._dynamo.reset()
    return ComposerBGEM3(*parts, gates, WEIGHTS).train()


def step(model: ComposerBGEM3, batch: dict, number: int) -> tuple[Tensor, dict[str, Tensor]]:
    model.l0_module.step = number
    model.zero_grad()
    loss = model.loss(model(batch), batch)["total"]
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compiled(model: ComposerBGEM3, backend: object) -> ComposerBGEM3:
    other = copy.deepcopy(model)
    other.backbone.compile_encoder(True, backend)
    return other


def assert_same_steps(first: ComposerBGEM3, second: ComposerBGEM3, batches: list[dict]) -> None:
    for number, batch in enumerate(batches):
        (loss, grads), (expected, wanted) = step(first, batch, number), step(second, batch, number)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        assert grads.keys() == wanted.keys()
        for name, value in grads.items():
            torch.testing.assert_close(value, wanted[name], atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_one_graph_for_all_gates_and_one_more_for_all_sizes(backend, model):
    """With a graph of the backward pass of any size too, it takes ten times as long."""
    counter = CompileCounterWithBackend(backend)
    fast = compiled(model, counter)
    assert_same_steps(fast, model, [batch_of(8, 3, 5, 8, seed=n) for n in range(3)])
    assert counter.frame_count == 1
    sizes = [(9, 3, 5), (4, 4, 2, 7, 7), (12, 2, 6)]
    assert_same_steps(fast, model, [batch_of(*lengths) for lengths in sizes])
    assert counter.frame_count <= 3


def test_closed_gates_are_no_branch(model):
    """A closed layer, all heads of a layer, half of the dimensions: the same graph."""
    counter = CompileCounterWithBackend("aot_eager")
    fast = compiled(model, counter)
    batch = batch_of(6, 2, 4)
    step(fast, batch, 0)
    for module in (model.l0_module, fast.l0_module):
        with torch.no_grad():
            module.log_alpha["layer"][1] = -9.0
            module.log_alpha["head"][2] = -9.0
            module.log_alpha["hidden"][::2] = -9.0
    assert_same_steps(fast, model, [batch])
    assert counter.frame_count == 1


@pytest.mark.parametrize("training", [False, True], ids=["for evaluation", "for training"])
def test_it_runs_in_the_mode_that_it_was_made_for_and_is_saved_as_the_plain_one(training, model):
    counter = CompileCounterWithBackend("aot_eager")
    fast = copy.deepcopy(model).eval()
    fast.backbone.compile_encoder(training, counter)
    batch = batch_of(7, 3, 3)
    with torch.no_grad():
        found, expected = fast(batch)["dense_vecs"], model.eval()(batch)["dense_vecs"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert counter.frame_count == (0 if training else 1)
    step(fast.train(), batch, 0)
    assert counter.frame_count == 1
    assert fast.state_dict().keys() == model.state_dict().keys()


@pytest.mark.slow
def test_the_code_that_runs_computes_the_same(model):
    """Not only the graph, but what is made of it; on the CPU it takes a minute to compile."""
    fast = compiled(model, "inductor")
    assert_same_steps(fast, model, [batch_of(8, 3, 5, 8), batch_of(8, 8, 2, 1, seed=4)])
