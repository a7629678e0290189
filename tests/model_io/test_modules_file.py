"""Which modules of sentence-transformers are known, and which are not silently left out."""

import json

import pytest

from bge_pruning.model_io.projection import (
    ForeignModuleError,
    Module,
    check_modules,
    compute_modules,
    read_modules,
)

OURS = ["", "1_Pooling", "2_Dense", "3_Normalize"]
# As sentence-transformers 6 saves them.
LONG = [
    ("sentence_transformers.base.modules.transformer.Transformer", ""),
    ("sentence_transformers.sentence_transformer.modules.pooling.Pooling", "1_Pooling"),
    ("sentence_transformers.base.modules.dense.Dense", "2_Dense"),
    ("sentence_transformers.base.modules.normalize.Normalize", "3_Normalize"),
]


def write(folder, *modules):
    entries = [{"idx": n, "path": path, "type": kind} for n, (kind, path) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("projected", "paths"), [(True, OURS), (False, ["", "1_Pooling", "2_Normalize"])]
)
def test_what_is_written_is_applied(projected, paths, tmp_path):
    """With the four types by which text-embeddings-inference tells modules, and no others."""
    written = compute_modules(projected)
    assert [module["path"] for module in written] == paths
    assert [(module["idx"], module["name"]) for module in written] == [
        (n, str(n)) for n in range(len(paths))
    ]
    known = [f"sentence_transformers.models.{path.partition('_')[2]}" for path in paths[1:]]
    types = [module["type"] for module in written]
    assert types == ["sentence_transformers.models.Transformer", *known]
    (tmp_path / "modules.json").write_text(json.dumps(written))
    assert [module.path for module in check_modules(tmp_path)] == paths


def test_modules_that_are_applied(tmp_path):
    """Vectors that are not normalised have the same similarities by cosine."""
    assert read_modules(tmp_path) == check_modules(tmp_path) == []
    write(tmp_path, *LONG)
    expected = [Module(kind.rpartition(".")[2], path) for kind, path in LONG]
    assert check_modules(tmp_path) == expected
    write(tmp_path, *LONG[:2])
    assert len(check_modules(tmp_path)) == 2


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        ([*LONG[:2], ("sentence_transformers.models.LayerNorm", "2_LayerNorm")], "LayerNorm"),
        ([*LONG[:2], ("custom.Dense", "2_Dense")], r"custom\.Dense"),
        ([*LONG[:2], (LONG[2][0], "2_Dense_1024")], "Dense in '2_Dense_1024'"),
        ([*LONG, (LONG[2][0], "2_Dense")], "Dense in '2_Dense'"),
        ([*LONG[:2], LONG[3], LONG[2]], "Dense in '2_Dense'"),
        ([LONG[0], (LONG[1][0], "pooling")], "Pooling in 'pooling'"),
        ([(LONG[0][0], "0_Transformer")], "Transformer in '0_Transformer'"),
    ],
    ids=["kind", "class", "path", "twice", "order", "pooling", "transformer"],
)
def test_a_module_that_is_not_applied(modules, named, tmp_path):
    write(tmp_path, *modules)
    message = rf"modules\.json: the module {named}.* is not applied here, .* To fix, choose another"
    with pytest.raises(ForeignModuleError, match=message):
        check_modules(tmp_path)


@pytest.mark.parametrize("text", ["{", "7", '["Dense"]', '[{"path": ""}]', '[{"type": 3}]', '"a"'])
def test_a_file_of_another_kind(text, tmp_path):
    (tmp_path / "modules.json").write_text(text)
    message = r"modules\.json: is not a list of modules with path and type \(.*\)\. To fix, copy it"
    with pytest.raises(ValueError, match=message):
        read_modules(tmp_path)
