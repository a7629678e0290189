"""The README.md of an extracted model: what it says is true, and a hub can read it."""

import ast
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from bge_pruning.evaluation.tasks import RETRIEVAL, SIMILARITY
from bge_pruning.export.extract import ExtractOptions, extract
from bge_pruning.export.model_card import TASKS, render_model_card, write_model_card
from bge_pruning.models.encoder_shape import EncoderShape, count_parameters
from bge_pruning.utils.records import EvaluationRecord, IndexRecord, PruningRecord
from tests.common.files import contents

DATA = Path(__file__).parent / "data"
# BGE-M3, halved in layers, dimensions and heads, with everything that can be asked for beside it.
RECORDS = json.loads((DATA / "card_records.json").read_text(encoding="utf-8"))
FULL = RECORDS["pruning"]
BGE_M3 = EncoderShape(**FULL["source_shape"])
PLAIN = {
    "source": FULL["source"],
    "kept": FULL["kept"],
    "constraint": {},
    "batches": {"prune": 1200, "recover": 600},
    "pooling": "cls",
    "largest_difference": 1.234e-6,
}
EVALUATION = EvaluationRecord(**RECORDS["evaluation"])
COUNTS = dict(FULL["parameters"]["extracted"])
COUNTS["heads"] += 1024 * 512  # the map to the original's dimensions
SCORES = {**RECORDS["evaluation"], "parameters": {"model": COUNTS, "baseline": None}}
INDEX = IndexRecord(**RECORDS["index"])
NARROW = {"hidden_size": 512, "num_attention_heads": 8}
TOOLS = ["sentence-transformers", "transformers", "FlagEmbedding", "ONNX Runtime"]
PROGRAM = re.compile(r"^### ([^\n]+)\n\n```python\n(.*?)```", re.MULTILINE | re.DOTALL)
GOLDEN = {"full": (FULL, EVALUATION, INDEX), "plain": (None, None, None)}


def make_record(
    original: dict[str, Any] | None = None, shape: dict[str, Any] | None = None, **changes: Any
) -> PruningRecord:
    """A record of BGE-M3, with sizes of its own, cut to half its layers and to a shape."""
    sizes = {**FULL["source_shape"], **(original or {})}
    cut = {**sizes, "num_hidden_layers": 12, **(shape or {})}
    parameters = {
        name: count_parameters(EncoderShape(**found)).as_dict()
        for name, found in (("source", sizes), ("extracted", cut))
    }
    found = {**PLAIN, "source_shape": sizes, "shape": cut, "parameters": parameters, **changes}
    return PruningRecord(**found)


def full(*keys: str) -> dict[str, Any]:
    """Some keys of the full record."""
    return {key: FULL[key] for key in keys}


def make_card(**changes: Any) -> str:
    return render_model_card(make_record(**changes))


def source(base: str, license_id: str | None = "mit", origin: str | None = None) -> dict[str, Any]:
    return {"base_model": base, "revision": None, "license": license_id, "origin": origin}


def section(card: str, heading: str) -> str:
    found = re.search(rf"^##+ {heading}\n(.*?)(?=^##|\Z)", card, re.MULTILINE | re.DOTALL)
    return "" if found is None else found[1].strip()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_cards(name):
    assert set(TASKS) == {SIMILARITY, RETRIEVAL}
    content, evaluation, index = GOLDEN[name]
    record = PruningRecord(**content) if content else make_record()
    expected = (DATA / f"card_{name}.md").read_text(encoding="utf-8")
    assert render_model_card(record, evaluation, index) == expected


def test_the_numbers_of_the_table_are_bge_m3s():
    """What the table claims, counted once more: 24 layers, 250,002 + 8,194 + 1 rows."""
    layer = 4 * (1024 * 1024 + 1024) + 4096 * (2 * 1024 + 1) + 1024 + 4 * 1024
    embeddings = (250_002 + 8_194 + 1 + 2) * 1024
    said = section(make_card(shape={"intermediate_size": 2048}), "What was removed")
    assert (
        f"| encoder parameters | {24 * layer:,} | {12 * (layer - 2048 * 2049):,} | 33.3% |" in said
    )
    assert f"| embeddings parameters | {embeddings:,} | {embeddings:,} | 100.0% |" in said


def test_a_value_that_is_not_known_is_left_out_or_an_error():
    for missing in ({"pooling": None}, {"largest_difference": None}):
        with pytest.raises(TypeError):
            make_card(**missing)
    found = read_metadata(source=source("/my/models/secret", None))
    assert set(found) == {"library_name", "pipeline_tag", "tags"}
    found = read_metadata(source={"base_model": "BAAI/bge-m3", "revision": None})  # an old record
    assert found["base_model"] == "BAAI/bge-m3" and "license" not in found


def read_metadata(**changes: Any) -> dict[str, Any]:
    return yaml.safe_load(make_card(**changes).split("---\n")[1])


@pytest.mark.parametrize(
    ("base", "title"),
    [
        ("/models/é 模型", "é 模型"),
        ("models/x", "x"),
        ("/my/a: b # c", r"a: b \# c"),
        ("{name} {0} %s", "{name} {0} %s"),
        ("{{ 1 + 1 }}", "{{ 1 + 1 }}"),
        ("x`y", r"x\`y"),
        ("../x/y", "y"),
    ],
)
def test_a_local_path_is_neither_shown_nor_the_base_model(base, title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if base == "models/x":  # the form of a hub name, but a folder here
        (tmp_path / base).mkdir(parents=True)
    card = make_card(source=source(base))
    assert f"\n# Pruned from {title}\n" in card
    assert not re.search("models/|/my/|\\.\\./", card)
    assert "base_model" not in read_metadata(source=source(base))
    named = make_card(source=source(base, origin="owner/name"))
    assert "\nbase_model: owner/name\n" in named and "\n# Pruned from owner/name\n" in named
    assert "cut from [owner/name](https://huggingface.co/owner/name) by" in named
    assert base == "x`y" or base not in named


@pytest.mark.parametrize(
    ("original", "outputs"),
    [
        ({"sparse_head": False}, "(cls pooling) and multi-vectors of 1,024 dimensions, and loads"),
        ({"colbert_dim": 0}, "(cls pooling) and sparse token weights, and loads"),
        ({"colbert_dim": 0, "sparse_head": False}, "(cls pooling), and loads"),
    ],
    ids=str,
)
def test_without_both_heads(original, outputs):
    """FlagEmbedding would make random heads without a word."""
    card = make_card(original=original)
    assert f"dense vectors of 1,024 dimensions {outputs} in transformers and sentence-" in card
    assert "FlagEmbedding" not in card and "BgeM3EmbeddingModel" not in card
    assert ("| multi-vector size |" in card) == ("colbert_dim" not in original)


def test_what_is_said_only_where_it_is_true():
    for kept in ({}, {"layer": None}, {"layer": list(range(24))}):
        assert "Layers that stay" not in make_card(kept=kept)
    said = section(make_card(shape=NARROW), "Limits")
    assert "Dense vectors have 512 dimensions, not 1,024: an index of the original's" in said
    assert "an index" not in section(make_card(), "Limits")
    assert "* Texts are truncated at 8,192 tokens.\n" in make_card()
    card = make_card(max_seq_length=512, **full("onnx"))
    assert "* Texts are truncated at 512 tokens.\n" in card and "enable_truncation(512)" in card
    assert "colbert_dim" not in make_card()
    assert "colbert_dim=1024)" in make_card(shape=NARROW)
    assert "colbert_dim" not in make_card(shape={**NARROW, "colbert_dim": 512})
    overrides = """--hf-overrides '{"architectures": ["BgeM3EmbeddingModel"]}'  # all three"""
    servers = "text-embeddings-inference and vLLM"
    assert overrides in section(make_card(), servers)
    for other in (make_card(shape=NARROW), make_card(pooling="mean")):
        assert "BgeM3EmbeddingModel" not in other
        assert "vllm serve THIS_FOLDER --runner pooling\n" in section(other, servers)


def test_training():
    for batches, said in (
        ({}, "It was not trained after the cut."),
        ({"train": 7}, "Trained for 7 steps of training without gates."),
        ({"prune": 5, "recover": 6}, "Trained for 5 steps of pruning and 6 steps of recovery."),
    ):
        found = section(make_card(batches=batches), "What was removed")
        assert f"\n{said} `pruning.json` lists" in found


@pytest.mark.parametrize(
    ("method", "said", "paper"),
    [
        (None, None, "2204.00408"),
        ("l0", None, "2310.06694"),
        ("layers", "pruning whole layers only", None),
        ("magnitude", "the magnitude of the weights", None),
        ("activation", "the magnitude of the activations", "2407.14679"),
        ("reconstruction", "best compensates for what was removed", "2302.04089"),
        ("random", "at random", None),
    ],
)
def test_how_it_was_chosen_what_stays_and_whose_method_that_is(method, said, paper):
    card = make_card(method=method)
    assert ("What stays was" in card) == (said is not None) and (said or "") in card
    cited = section(card, "Licence and citation").partition("```\n")[2]
    assert (f"(https://arxiv.org/abs/{paper})" in cited) if paper else cited == ""


def test_a_card_tells_no_folders_and_its_table_stays_one():
    vocabulary = FULL["vocabulary"]
    names = ("/home/me/secret/news.txt", "a|b.txt", "data/sentences/newstest2019-en.txt.gz")
    rows = [{**vocabulary["coverage"][0], "corpus": name} for name in names]
    card = make_card(vocabulary={**vocabulary, "coverage": rows, "scripts": []})
    said = section(card, "Vocabulary")
    table = [line for line in said.splitlines() if line.startswith("|")]
    expected = ["news.txt", r"a\|b.txt", "data/sentences/newstest2019-en.txt.gz"]
    for line, name in zip(table[2:], expected, strict=True):
        assert line.startswith(f"| {name} | chosen |")
    assert "scripts: none" in said


def test_a_projection_and_quality_that_were_or_were_not_measured():
    said = section(make_card(source=source("/a/b")), "Quality")
    assert said.startswith("Quality: not measured. ") and "--baseline ORIGINAL " in said
    nothing = EvaluationRecord(**{**RECORDS["evaluation"], "tasks": []})
    card = render_model_card(make_record(), nothing)
    assert section(card, "Quality") == section(make_card(), "Quality")
    assert "model-index" not in card
    scores = EvaluationRecord(**{**RECORDS["evaluation"], "speed": None})
    said = section(render_model_card(make_record(), scores), "Size and speed")
    assert said.endswith("Speed: not measured.")
    int8 = json.loads(json.dumps(FULL["onnx_int8"]))
    int8["speed"]["threads"] = 1
    assert "(measured on a_b cpu, 1 thread)." in make_card(onnx_int8=int8)
    projection = {"kind": "selection", "dimensions": 1024, "texts": None}
    record = make_record(shape=NARROW, projection=projection)
    found = section(render_model_card(record), "Vector compatibility")
    assert "Removed dimensions are 0." in found
    assert "How well it keeps working: not measured." in found
    measured = section(render_model_card(record, None, INDEX), "Vector compatibility")
    assert "not measured" not in measured and "finds 91.2%" in measured
    assert (
        section(render_model_card(make_record(), None, INDEX), "Vector compatibility") in measured
    )


def test_programs_are_python_for_this_folder_and_ask_for_its_outputs():
    for content in (FULL, {**FULL, "pooling": "cls"}):
        found = dict(PROGRAM.findall(render_model_card(PruningRecord(**content))))
        assert list(found) == TOOLS
        for program in found.values():
            ast.parse(program)
            assert "THIS_FOLDER" in program and "\ntexts = [" in program
            assert all(len(line) <= 100 for line in program.splitlines())
    onnx = {**FULL["onnx"], "outputs": ["last_hidden_state", "dense_vecs", "colbert_vecs"]}
    said = section(make_card(onnx=onnx), "ONNX Runtime")
    assert '"dense_vecs",  #' in said and '"colbert_vecs",  #' in said and said.endswith("```")
    assert "token_weights" not in said
    said = section(make_card(onnx=onnx, **full("onnx_int8")), "ONNX Runtime")
    assert said.endswith("`onnx/model_quantized.onnx` is the same graph with int8 weights.")


@pytest.mark.parametrize(
    ("found", "said", "cited"),
    [
        (source("BAAI/bge-m3"), "applies: `mit`.", "eprint = {2402.03216}"),
        (
            source("/home/me/m", "apache-2.0", "sentence-transformers/all-MiniLM-L6-v2"),
            "applies: `apache-2.0`.",
            "https://arxiv.org/abs/1908.10084",
        ),
        (
            source("intfloat/e5", "other"),
            "([intfloat/e5](https://huggingface.co/intfloat/e5)) applies; it is a custom licence.",
            "Cite the original as [intfloat/e5](https://huggingface.co/intfloat/e5) asks.",
        ),
        (source("/home/me/x", None), "original applies; its identifier was not known", None),
    ],
    ids=["BGE-M3", "sentence-transformers", "another model", "no name"],
)
def test_licence_and_citation(found, said, cited):
    card = make_card(source=found, method="random")
    assert said in section(card, "Licence and citation") and "/home/me" not in card
    assert cited in card if cited else "Cite" not in card
    for entry in re.findall(r"```bibtex\n(.*?)```", card, re.DOTALL):
        assert entry.count("{") == entry.count("}")
    link = read_metadata(source=found).get("license_link")
    assert link == ("https://huggingface.co/intfloat/e5" if "other" in found.values() else None)
    assert "license_link" not in read_metadata(source=source("/somewhere", "other"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """What a card is made from, and a file that is left alone."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "pruning.json").write_text(json.dumps(FULL))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 512}')
    (folder / "config.json").write_text("{}")
    write_model_card(folder)
    return folder


@pytest.fixture
def write(tmp_path, folder) -> Callable[..., Path]:
    """A function that writes a JSON file about a model."""

    def write(name: str, content: dict[str, Any], key: str, model: Path = folder) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps({**content, key: str(model)}, indent=1), encoding="utf-8")
        return path

    return write


def test_scores_and_a_copy_of_them(folder, write):
    """A folder that was moved keeps them, although another model is there now."""
    evaluation = write("scores.json", SCORES, "model")
    before = contents(folder)
    assert write_model_card(folder, evaluation) == folder / "README.md"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert len(ModelCard(card).data.eval_results) == 3
    assert (folder / "evaluation.json").read_bytes() == evaluation.read_bytes()
    after = contents(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"README.md", "evaluation.json"} and set(before) <= set(after)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 77}')
    write_model_card(folder)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "* Texts are truncated at 77 tokens." in card
    card = (folder / "README.md").read_bytes()
    moved = folder.rename(folder.with_name("moved"))
    shutil.copytree(moved, folder)
    write_model_card(moved)
    assert (moved / "README.md").read_bytes() == card


def test_what_is_known_already_stays(folder, write):
    evaluation = write("scores.json", SCORES, "model")
    index = write("index.json", RECORDS["index"], "new")
    write_model_card(folder, evaluation)
    write_model_card(folder, index=index)
    both = (folder / "README.md").read_bytes()
    assert b"| stsb-en-test | dense | Spearman |" in both and b"finds 91.2%" in both
    assert (folder / "index_compatibility.json").read_bytes() == index.read_bytes()
    evaluation.unlink()
    index.unlink()
    write_model_card(folder)
    assert (folder / "README.md").read_bytes() == both
    write_model_card(folder, folder / "evaluation.json", folder / "index_compatibility.json")
    assert (folder / "README.md").read_bytes() == both


def test_an_evaluation_of_a_folder_that_is_gone_or_through_a_link(folder, write):
    link = folder.with_name("link")
    link.symlink_to(folder)
    for model in (folder / "gone", link):
        write_model_card(folder, write("a.json", SCORES, "model", model))
        assert json.loads((folder / "evaluation.json").read_text())["model"] == str(model)


def test_scores_of_an_extracted_model(run, model_folder, sts_csv, tmp_path):
    """An evaluation counts the map of a projection, which ``pruning.json`` does not."""
    from bge_pruning.evaluation.evaluate import evaluate
    from bge_pruning.evaluation.tasks import find_tasks

    folder, path = tmp_path / "wide", tmp_path / "scores.json"
    extract(run, folder, options=ExtractOptions(keep_dimension=True))
    tasks = find_tasks([str(sts_csv)], [], "test")
    found = evaluate(str(folder), str(model_folder), tasks, device="cpu", speed=False)
    path.write_text(json.dumps(found.as_dict()))
    write_model_card(folder, path)
    card = (folder / "README.md").read_text(encoding="utf-8")
    score = found.tasks[0]
    assert f"| tiny | dense | Spearman | {score.baseline:.4f} | {score.value:.4f} |" in card


@pytest.fixture
def refused(folder) -> Callable[..., None]:
    """A function that expects an error, and that nothing was written."""

    def check(error: type[Exception], message: str, *files: Path | None) -> None:
        before = contents(folder)
        with pytest.raises(error, match=message):
            write_model_card(folder, *files)
        assert contents(folder) == before

    return check


def test_a_folder_that_is_not_ours(tmp_path):
    (tmp_path / "README.md").write_text("ten years of work")
    message = r"holds no pruning\.json, so it is not an extracted model and its README\.md is kept"
    with pytest.raises(FileNotFoundError, match=message):
        write_model_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == "ten years of work"


def test_files_about_something_else_are_refused(refused, tmp_path, write, folder):
    """A model agrees with itself to 100 %: that says nothing of the original's index."""
    message = r"none\.json: no such file\. To fix, give the JSON file that scripts/{} wrote\."
    none = tmp_path / "none.json"
    refused(FileNotFoundError, message.format(r"evaluate_model\.py"), none)
    refused(FileNotFoundError, message.format(r"check_index_compatibility\.py"), None, none)
    other = write("other.json", {}, "model")
    message = r"other\.json: has no tasks, parameters\. To fix, give the JSON .*evaluate_model\.py"
    refused(ValueError, message, other)
    message = r"other\.json: has no new, passages, .*check_index_compatibility\.py wrote\."
    refused(ValueError, message, None, other)
    other.write_text("# Scores")
    refused(ValueError, r"other\.json: is not JSON", other)
    message = r"a\.json: compares the model with itself.* To fix, give the original as OLD to"
    content = {**RECORDS["index"], "old": str(folder)}
    refused(ValueError, message, None, write("a.json", content, "new"))


def test_files_about_another_model_are_refused(refused, folder, write):
    """Scores of the int8 graph are not those of the model either."""
    other = shutil.copytree(folder, folder.with_name("other"))
    message = r"a\.json: is about .*other, not about .*small\. To fix, give a file that is about"
    refused(ValueError, message, write("a.json", SCORES, "model", other))
    refused(ValueError, message, None, write("a.json", RECORDS["index"], "new", other))
    (folder / "onnx").mkdir()
    graph = folder / "onnx" / "model_quantized.onnx"
    graph.touch()
    message = r"a\.json: is about .*model_quantized\.onnx, not about .*small\. To fix"
    refused(ValueError, message, write("a.json", SCORES, "model", graph))
    counts = SCORES["parameters"]["model"]
    message = r"with other parameters: encoder {} \(here " + f"{counts['encoder']:,}" + r"\)"
    other = {"model": {**counts, "encoder": 1234}}
    for parameters, said in ((other, "1,234"), (None, "0"), ({}, "0"), ({"model": None}, "0")):
        content = {**SCORES, "parameters": parameters}
        path = write("a.json", content, "model", folder / "gone")
        refused(ValueError, r"a\.json: is about a model " + message.format(said), path)
    content = {**SCORES, "parameters": {"model": {**counts, "heads": 5}}}
    (folder / "evaluation.json").write_text(json.dumps(content))
    refused(ValueError, r"evaluation\.json: is about a model with other parameters: heads 5 \(here")
    tasks = [{key: v for key, v in SCORES["tasks"][0].items() if key != "interval"}]
    path = write("a.json", {**SCORES, "tasks": tasks}, "model")
    message = r"small: the card cannot be made, something is missing .*\. To fix, extract and"
    refused(ValueError, message, path)
