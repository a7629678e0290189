"""A training step on a GPU: it waits for nothing, whatever kernels and compilers do."""

import pytest
import torch

from bge_pruning.models import packing as attention
from bge_pruning.models.composer_bge_m3 import ComposerBGEM3
from bge_pruning.models.l0_module_embedding import L0Module
from bge_pruning.models.objective import LossWeights
from bge_pruning.models.packing import varlen_attn
from bge_pruning.models.structural_pruning import AXES
from bge_pruning.training.optimization import l0_groups, weight_groups

pytestmark = pytest.mark.gpu


@pytest.fixture
def gated_step(build_model, tiny_shape, target_shape):

    def build(autocast, dropout=0.0):
        parts = build_model(tiny_shape, torch.float32, seed=1, dropout=dropout)
        gates = L0Module(tiny_shape, AXES, target_shape, seed=2)
        weights = LossWeights(distillation_alignment=1.0, distillation_similarity=1.0)
        model = ComposerBGEM3(*parts, gates, weights).cuda().train()
        groups = weight_groups([model.backbone, model.heads], 1e-4, 0.01)
        groups += l0_groups(gates, 0.1, 0.02, 1.0)
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)

        def step(batch):
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss = model.loss(model(batch), batch)["total"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            gates.clamp_()
            gates.step += 1
            return loss

        return model, step

    return build


def gpu_batch(*lengths):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.where(mask.bool(), torch.randint(4, 99, mask.shape, generator=generator), 1)
    vectors = torch.nn.functional.normalize(torch.randn(len(lengths), 1, 32), dim=-1)
    batch = {"input_ids": ids[:, None], "attention_mask": mask[:, None]}
    batch = {n: v.cuda() for n, v in {**batch, "teacher_dense_vecs": vectors}.items()}
    return batch | {"lengths": [[n] for n in lengths]}


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["packed", "compiled"])
def test_a_step_does_not_wait_for_the_gpu(compiled, autocast, gated_step):
    model, step = gated_step(autocast)
    if compiled:
        model.backbone.compile_encoder(training=True)
    batch = gpu_batch(9, 3, 7, 3)
    step(batch)  # what is made once may wait: kernels, moments, compiled code
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(varlen_attn is None, reason="torch before 2.10 has no such kernel")
def test_the_kernel_for_any_lengths_computes_what_groups_do(gated_step, monkeypatch):
    model, _ = gated_step(autocast=True)
    batch = gpu_batch(9, 3, 7, 3, 8)
    model.l0_module.step = 5
    with torch.autocast("cuda", torch.bfloat16), torch.no_grad():
        found = model(batch)["dense_vecs"]
        monkeypatch.setattr(attention, "varlen_attn", None)
        expected = model(batch)["dense_vecs"]
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_compiled_on_the_gpu_it_learns_the_same(autocast, gated_step):
    (_, plain_step), (fast, fast_step) = gated_step(autocast), gated_step(autocast)
    fast.backbone.compile_encoder(training=True)
    batch = gpu_batch(9, 3, 7, 3)
    tolerance = 5e-2 if autocast else 1e-4
    for _ in range(3):
        torch.testing.assert_close(
            fast_step(batch), plain_step(batch), atol=tolerance, rtol=tolerance
        )


def test_gates_and_multipliers_stay_float32_under_autocast(gated_step):
    model, step = gated_step(autocast=True)
    step(gpu_batch(9, 3))
    assert {p.dtype for p in model.l0_module.parameters()} == {torch.float32}
    with torch.autocast("cuda", torch.bfloat16):
        assert model.l0_module.lagrangian().dtype == torch.float32
        assert model.l0_module.sample_masks().hidden.dtype == torch.float32
