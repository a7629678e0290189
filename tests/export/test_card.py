"""The card of an extracted folder, written again with what is about this model alone."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from bge_pruning.export.card import write_model_card
from bge_pruning.export.extract import ExtractOptions, extract

INDEX = {
    **{"old": "BAAI/bge-m3", "passages": 3000, "queries": 43, "top_k": 10, "chance": 0.003},
    **{"agreement": 0.912, "agreement_interval": [0.88, 0.94], "same_first": 0.95},
    "cosine": {"mean": 0.9876, "p5": 0.95},
}


@pytest.fixture(scope="module")
def extracted(tmp_path_factory, train_tiny) -> Path:
    folder = tmp_path_factory.mktemp("extracted")
    extract(train_tiny(folder / "train", "max_duration=1ba"), folder / "small")
    return folder / "small"


@pytest.fixture(scope="module")
def evaluated(extracted, model_folder, sts_csv) -> dict:
    from bge_pruning.evaluation.evaluate import evaluate
    from bge_pruning.evaluation.tasks import find_tasks

    tasks = find_tasks([str(sts_csv)], [], "test")
    return evaluate(str(extracted), str(model_folder), tasks, device="cpu", speed=False)


@pytest.fixture
def folder(extracted, tmp_path) -> Path:
    return shutil.copytree(extracted, tmp_path / "small")


@pytest.fixture
def write(tmp_path, folder):
    """A function that writes a JSON file about a model."""

    def write(name: str, content: dict, key: str, model: Path = folder) -> Path:
        path = tmp_path / name
        text = json.dumps({**content, key: str(model)}, indent=1)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def evaluation(write, evaluated) -> Path:
    return write("scores.json", evaluated, "model")


@pytest.fixture
def index(write) -> Path:
    return write("index.json", INDEX, "new")


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# What is written


def test_scores_and_a_copy_of_them(folder, evaluation, evaluated):
    before = contents(folder)
    assert write_model_card(folder, evaluation) == folder / "README.md"
    card = (folder / "README.md").read_text(encoding="utf-8")
    score = evaluated["tasks"][0]
    assert f"| tiny | dense | Spearman | {score['baseline']:.4f} | {score['value']:.4f} |" in card
    (result,) = ModelCard(card).data.eval_results
    assert result.metric_value == round(score["value"], 4)
    assert (folder / "evaluation.json").read_bytes() == evaluation.read_bytes()
    after = contents(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"README.md", "evaluation.json"} and set(before) <= set(after)


def test_what_is_known_already_stays(folder, evaluation, index):
    write_model_card(folder, evaluation)
    write_model_card(folder, index=index)
    both = (folder / "README.md").read_bytes()
    assert b"| tiny | dense | Spearman |" in both and b"finds 91.2%" in both
    assert (folder / "index_compatibility.json").read_bytes() == index.read_bytes()
    evaluation.unlink()
    index.unlink()
    write_model_card(folder)
    assert (folder / "README.md").read_bytes() == both
    write_model_card(folder, folder / "evaluation.json", folder / "index_compatibility.json")
    assert (folder / "README.md").read_bytes() == both


def test_a_folder_that_was_moved_keeps_its_scores(folder, evaluation):
    """Although there is another model now where they were measured."""
    write_model_card(folder, evaluation)
    card = (folder / "README.md").read_bytes()
    moved = folder.rename(folder.with_name("moved"))
    shutil.copytree(moved, folder)
    write_model_card(moved)
    assert (moved / "README.md").read_bytes() == card


def test_an_evaluation_of_a_folder_that_is_gone(folder, write, evaluated):
    write_model_card(folder, write("a.json", evaluated, "model", folder / "gone"))
    assert (folder / "evaluation.json").exists()


def test_an_evaluation_through_a_link(folder, write, evaluated, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    write_model_card(folder, write("a.json", evaluated, "model", tmp_path / "link"))
    assert (folder / "evaluation.json").exists()


def test_scores_of_a_model_with_a_projection(extracted, model_folder, sts_csv, tmp_path):
    """An evaluation counts the map, which ``pruning.json`` does not."""
    from bge_pruning.evaluation.evaluate import evaluate
    from bge_pruning.evaluation.tasks import find_tasks

    run, folder = extracted.parent / "train" / "runs" / "tiny", tmp_path / "wide"
    extract(run, folder, options=ExtractOptions(keep_dimension=True))
    tasks = find_tasks([str(sts_csv)], [], "test")
    found = evaluate(str(folder), str(model_folder), tasks, device="cpu", speed=False)
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(found))
    write_model_card(folder, path)
    assert "| tiny | dense | Spearman |" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_limit_of_texts_is_that_of_the_folder(folder):
    path = folder / "sentence_bert_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_seq_length": 77}))
    write_model_card(folder)
    assert "* Texts are cut at 77 tokens." in (folder / "README.md").read_text(encoding="utf-8")


# What is refused


@pytest.fixture
def refused(folder):
    """A function that expects an error, and that nothing was written."""

    def check(error: type[Exception], message: str, *files: Path | None) -> None:
        before = contents(folder)
        with pytest.raises(error, match=message):
            write_model_card(folder, *files)
        assert contents(folder) == before

    return check


def test_a_folder_that_is_not_ours(tmp_path, model_folder):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text("ten years of work")
    message = r"mine: holds no pruning\.json, so it is no extracted model and its README\.md is ke"
    with pytest.raises(FileNotFoundError, match=message):
        write_model_card(folder)
    assert (folder / "README.md").read_text() == "ten years of work"


def test_a_file_that_is_not_there(refused, tmp_path):
    message = r"none\.json: no such file\. To fix, check the path\."
    refused(FileNotFoundError, message, tmp_path / "none.json")
    refused(FileNotFoundError, message, None, tmp_path / "none.json")


def test_a_file_that_is_something_else(refused, write):
    other = write("other.json", {}, "model")
    message = r"other\.json: has no tasks, parameters\. To fix, give the JSON .*evaluate_model\.py"
    refused(ValueError, message, other)
    message = r"other\.json: has no new, passages, .*check_index_compatibility\.py wrote\."
    refused(ValueError, message, None, other)
    other.write_text("# Scores")
    refused(ValueError, r"other\.json: is not JSON", other)


def test_another_model_of_the_same_sizes(refused, folder, write, evaluated, index):
    other = shutil.copytree(folder, folder.with_name("other"))
    message = r"a\.json: is about .*other, not about .*small\. To fix, give a file that is about"
    refused(ValueError, message, write("a.json", evaluated, "model", other))
    refused(ValueError, message, None, write("a.json", INDEX, "new", other))


def test_an_index_of_its_own(refused, folder, write):
    """Agreement is 100 % then, and the card would tell it of the original's index."""
    message = r"a\.json: compares the model with itself.* To fix, give the original as OLD to"
    refused(ValueError, message, None, write("a.json", {**INDEX, "old": str(folder)}, "new"))


def test_a_file_of_the_folder(refused, folder, write, evaluated):
    """Scores of the int8 graph are not those of the model."""
    (folder / "onnx").mkdir()
    graph = folder / "onnx" / "model_quantized.onnx"
    graph.touch()
    message = r"a\.json: is about .*model_quantized\.onnx, not about .*small\. To fix"
    refused(ValueError, message, write("a.json", evaluated, "model", graph))


def test_a_model_of_other_sizes(refused, folder, write, evaluated):
    real = evaluated["parameters"]["model"]["encoder"]
    parameters = {"model": {**evaluated["parameters"]["model"], "encoder": 1234}}
    path = write("a.json", {**evaluated, "parameters": parameters}, "model", folder / "gone")
    message = rf"a\.json: is about a model with other parameters: encoder 1,234 \(here {real:,}\)\."
    refused(ValueError, message, path)
    for nothing in (None, {}, {"model": None}):
        path = write("a.json", {**evaluated, "parameters": nothing}, "model", folder / "gone")
        refused(ValueError, r"with other parameters: encoder 0 \(here", path)


def test_scores_in_the_folder_that_are_of_another_model(refused, folder, evaluated):
    parameters = {"model": {**evaluated["parameters"]["model"], "heads": 5}}
    content = {**evaluated, "parameters": parameters}
    (folder / "evaluation.json").write_text(json.dumps(content))
    refused(ValueError, r"evaluation\.json: is about a model with other parameters: heads 5 \(here")


def test_records_that_lack_something(refused, folder, write, evaluated):
    tasks = [{key: v for key, v in evaluated["tasks"][0].items() if key != "interval"}]
    path = write("a.json", {**evaluated, "tasks": tasks}, "model")
    message = r"small: the card cannot be made, something is missing .*'interval'.*\. To fix, extr"
    refused(ValueError, message, path)
