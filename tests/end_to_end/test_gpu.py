"""What only a GPU can show. Off by default: ``make test PYTEST_ARGS="-m gpu"``."""

import pytest
import torch

from bge_pruning.model_io.checkpoint import cut
from bge_pruning.models.structural_pruning import PruningMasks
from tests.common.trainings import extract_json, losses, read_metrics

pytestmark = pytest.mark.gpu


@pytest.fixture
def train(train_tiny):
    """Trains on a GPU or the CPU, though their ranks talk to each other by different backends."""

    def leave():
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def run(*arguments):
        leave()
        return train_tiny(*arguments)

    yield run
    leave()


def test_a_step_on_the_gpu_is_a_step_on_the_cpu(tmp_path, train):
    arguments = ("max_duration=3ba", "optimizer.eps=1e-4")
    cpu = train(tmp_path / "cpu", *arguments)
    gpu = train(tmp_path / "gpu", *arguments, "device=gpu")
    assert losses(gpu) == pytest.approx(losses(cpu), abs=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
@pytest.mark.parametrize("compiled", ["false", "true"], ids=["packed", "compiled"])
def test_trained_on_the_gpu_extracted_on_the_cpu(precision, compiled, tmp_path, train):
    arguments = (f"precision={precision}", f"model.compile={compiled}")
    run = train(tmp_path, "device=gpu", *arguments)
    assert extract_json(run, tmp_path / "small")["largest_difference"] <= 1e-5


def test_all_outputs_are_trained_and_watched_on_the_gpu(tmp_path, train):
    parts = ("loss.distillation_sparse=1", "loss.distillation_colbert=1", "log_interval=2ba")
    watched = {}
    for device in ("cpu", "gpu"):
        run = train(tmp_path / device, *parts, "optimizer.eps=1e-4", f"device={device}")
        items = (item for row in read_metrics(run) for item in row["metrics"].items())
        watched[device] = {key: value for key, value in items if "/dense/" in key}
    assert len(watched["cpu"]) == 4
    assert watched["gpu"] == pytest.approx(watched["cpu"], abs=1e-3)


def test_masked_equals_extracted_on_the_gpu(tmp_path, model_folder):
    from bge_pruning.model_io.pretrained import load_base_model

    base = load_base_model(str(model_folder))
    backbone, heads = base.backbone.cuda().double().eval(), base.heads.cuda().double()
    hidden_z = torch.ones(32, dtype=torch.float64, device="cuda")
    hidden_z[::3] = 0.0
    layer_z = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64, device="cuda")
    masks = PruningMasks(hidden=hidden_z, layer=layer_z)
    ids = torch.tensor([[0, 8, 9, 10, 2], [0, 7, 2, 1, 1]], device="cuda")
    mask = ids.ne(1).long()
    keep = backbone.keep_indices(masks)
    with torch.no_grad():
        masked = heads.outputs(backbone(ids, mask, masks), mask)
        cut(backbone, heads, keep)
        small = heads.outputs(backbone(ids, mask), mask)
    masked["dense_vecs"] = masked["dense_vecs"][:, keep.hidden]
    for name, value in small.items():
        torch.testing.assert_close(value, masked[name], atol=1e-10, rtol=0)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("state_dict", ["full", "sharded"])
def test_sharded_on_the_gpu_as_on_the_cpu(state_dict, tmp_path, train):
    arguments = ("max_duration=3ba", "optimizer.eps=1e-4")
    sharded = ("parallelism.fsdp=true", f"parallelism.state_dict={state_dict}", "device=gpu")
    cpu = train(tmp_path / "cpu", *arguments)
    gpu = train(tmp_path / "gpu", *arguments, *sharded)
    assert losses(gpu) == pytest.approx(losses(cpu), abs=1e-4)
    assert extract_json(gpu, tmp_path / "small")["largest_difference"] <= 1e-5
