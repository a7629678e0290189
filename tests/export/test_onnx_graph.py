"""The graph by hand: the same numbers as transformers, for any shape of batch."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch.nn.functional import normalize

from bge_pruning.evaluation.onnx_encoder import open_session, run_session
from bge_pruning.export.onnx_export import MODEL, write_graph
from bge_pruning.export.onnx_graph import HIDDEN, SENTENCE
from bge_pruning.model_io.pretrained import load_base_model
from bge_pruning.models.structural_pruning import PruningMasks
from tests.common.formulas import compute_outputs

ALL = (HIDDEN, "dense_vecs", "token_weights", "colbert_vecs")


def batch(lengths: list[int], pad: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 50, (len(lengths), max(lengths)), generator=generator)
    ids[:, 0] = 0
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, pad), mask.long()


def named(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids, "attention_mask": mask}


def session_of(folder, tmp_path):
    base = load_base_model(str(folder))
    write_graph(base, tmp_path)
    return open_session(tmp_path / MODEL)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("lengths", [[9], [2], [5, 5], [128, 3, 60], [7, 2, 4, 6, 3]], ids=str)
def test_outputs_are_those_of_transformers(lengths, pooling, copy_without, tmp_path):
    """Texts of different lengths: padding moves neither positions nor attention nor a mean."""
    folder = copy_without(pooling=pooling)
    ids, mask = batch(lengths)
    found = run_session(session_of(folder, tmp_path), ids, mask, ALL)
    expected = compute_outputs(folder, pooling, named(ids, mask))
    real = mask.bool().numpy()
    np.testing.assert_allclose(found[HIDDEN][real], expected.pop(HIDDEN)[real], atol=1e-5)
    assert expected["token_weights"][:, 0].all()
    expected["token_weights"][:, 0] = 0.0  # of <s>, a special token
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)
    assert not found["token_weights"][~real].any()
    assert not found["colbert_vecs"][~real[:, 1:]].any()


def test_a_text_is_the_same_alone_and_may_spell_padding_out(folder, tmp_path):
    """The id of the padding token counts as padding in a text, its mask does not."""
    session = session_of(folder, tmp_path)
    ids, mask = batch([9, 4, 6])
    together = run_session(session, ids, mask, ALL)
    for row, length in enumerate((9, 4, 6)):
        alone = run_session(session, ids[row : row + 1, :length], mask[row : row + 1, :length], ALL)
        np.testing.assert_allclose(together["dense_vecs"][row], alone["dense_vecs"][0], atol=1e-6)
        np.testing.assert_allclose(
            together["colbert_vecs"][row, : length - 1], alone["colbert_vecs"][0], atol=1e-6
        )
    ids, mask = batch([6, 4])
    ids[0, 3] = 1
    found = run_session(session, ids, mask, (HIDDEN, "dense_vecs"))
    expected = compute_outputs(folder, "cls", named(ids, mask))
    np.testing.assert_allclose(found["dense_vecs"], expected["dense_vecs"], atol=1e-5)
    np.testing.assert_allclose(found[HIDDEN][0], expected[HIDDEN][0], atol=1e-5)


def test_only_heads_that_exist(copy_without, tmp_path):
    session = session_of(copy_without("sparse_linear", "colbert_linear"), tmp_path)
    assert [output.name for output in session.get_outputs()] == [HIDDEN, "dense_vecs"]


def test_a_multi_vector_head_of_another_size(folder, tmp_path):
    torch.save(torch.nn.Linear(32, 8).state_dict(), folder / "colbert_linear.pt")
    session = session_of(folder, tmp_path)
    found = run_session(session, *batch([5, 3]), ("colbert_vecs",))["colbert_vecs"]
    assert found.shape == (2, 4, 8)


def test_a_model_cut_in_memory(folder, tmp_path):
    """Its shape still tells the old sizes; the graph has those of the weights."""
    base = load_base_model(str(folder))
    hidden = torch.zeros(32).index_fill(0, torch.arange(0, 32, 2), 1.0)
    heads = torch.ones(4, 4).index_fill(1, torch.tensor([1, 2]), 0.0)
    keep = base.backbone.keep_indices(PruningMasks(head=heads, hidden=hidden))
    base.backbone.prune(keep)
    base.heads.prune(keep.hidden)
    write_graph(base, tmp_path)
    ids, mask = batch([6, 3])
    with torch.no_grad():
        expected = base.heads.outputs(base.backbone.eval()(ids, mask), mask)
    found = run_session(open_session(tmp_path / MODEL), ids, mask, ALL[1:])
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_projected_dense_vectors(pooling, copy_without, tmp_path):
    """The other outputs know nothing of it; text-embeddings-inference reads the second name."""
    folder = copy_without(pooling=pooling)
    projection = torch.randn(40, 32, generator=torch.Generator().manual_seed(4))
    base = replace(load_base_model(str(folder)), projection=projection)
    model = write_graph(base, tmp_path)
    ids, mask = batch([7, 2, 4])
    found = run_session(open_session(tmp_path / MODEL), ids, mask, (*ALL, SENTENCE))
    expected = compute_outputs(folder, pooling, named(ids, mask))
    expected["dense_vecs"] = normalize(expected["dense_vecs"] @ projection.T, dim=-1)
    real = mask.bool().numpy()
    np.testing.assert_allclose(found[HIDDEN][real], expected.pop(HIDDEN)[real], atol=1e-5)
    assert expected["token_weights"][:, 0].all()
    expected["token_weights"][:, 0] = 0.0  # of <s>, a special token
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(found[SENTENCE], found["dense_vecs"])
    assert [output.name for output in model.graph.output] == [*ALL, SENTENCE]


def test_the_graph_is_small_sorted_and_has_the_names_of_others(folder, tmp_path):
    """The names of the axes are those by which Optimum sizes its outputs."""
    model = write_graph(load_base_model(str(folder)), tmp_path)

    def axes(values) -> dict[str, list]:
        return {
            v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in values
        }

    both = ["batch_size", "sequence_length"]
    assert axes(model.graph.input) == {"input_ids": both, "attention_mask": both}
    assert axes(model.graph.output) == {
        HIDDEN: [*both, 32],
        "dense_vecs": ["batch_size", 32],
        "token_weights": both,
        "colbert_vecs": ["batch_size", "sequence_length - 1", 32],
    }
    kinds = {value.type.tensor_type.elem_type for value in model.graph.input}
    assert kinds == {onnx.TensorProto.INT64}
    assert [(found.domain, found.version) for found in model.opset_import] == [("", 17)]
    assert model.ir_version == 8
    names = {weight.name for weight in model.graph.initializer}
    assert {"embeddings.word_embeddings.weight", "encoder.layer.3.output.dense.weight"} <= names
    assert {"sparse_linear.bias", "colbert_linear.weight"} <= names
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["MatMul"] == 4 * 8 + 2 and kinds["LayerNormalization"] == 9
    assert not {"Loop", "If", "Scan", "Shape"} & set(kinds)
    made = {value.name for value in (*model.graph.input, *model.graph.initializer)}
    for node in model.graph.node:
        assert set(node.input) <= made
        assert not set(node.output) & made
        made |= set(node.output)


def test_runtime_fuses_the_activation(folder, tmp_path):
    """Otherwise GELU is five passes over the largest tensor of a layer."""
    import onnxruntime

    write_graph(load_base_model(str(folder)), tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / MODEL), options, ["CPUExecutionProvider"])
    optimised = onnx.load(tmp_path / "optimised.onnx")
    kinds = Counter(node.op_type for node in optimised.graph.node)
    assert kinds["Erf"] == 0
    assert kinds["BiasGelu"] + kinds["Gelu"] == 4
