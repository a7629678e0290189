import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import pairwise_cos_sim

from bge_pruning.utils import evaluation
from bge_pruning.utils.evaluation import (
    Score,
    _count,
    _describe_task,
    evaluate,
    load_encoder,
    score_sts,
    unique_sentences,
    write_json,
    write_text,
)

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_model.py"


@pytest.fixture(scope="module")
def result(tiny_folder, small_folder, pairs):
    return evaluate(
        str(small_folder),
        str(tiny_folder),
        {"six": pairs},
        also={"before recovery": str(small_folder), "same": str(tiny_folder)},
        device="cpu",
    )


def test_value_equals_a_plain_computation(result, small_folder, pairs):
    model = SentenceTransformer(str(small_folder), device="cpu")
    cosines = pairwise_cos_sim(model.encode(pairs[0]), model.encode(pairs[1])).numpy()
    assert result["tasks"][0]["value"] == pytest.approx(spearmanr(cosines, pairs[2]).statistic)


def test_task_entry_is_consistent(result, small_folder, tiny_folder):
    (task,) = result["tasks"]
    assert (task["task"], task["mode"], task["metric"]) == ("six", "dense", "cosine_spearman")
    assert task["pairs"] == 6
    assert task["floor"] == max(task["floors"].values())
    assert set(task["floors"]) == {"random_weights", "word_embeddings"}
    assert task["also"] == pytest.approx(
        {"before recovery": task["value"], "same": task["baseline"]}
    )
    assert (result["model"], result["baseline"]) == (str(small_folder), str(tiny_folder))


@pytest.mark.parametrize(
    ("baseline", "retention", "above"),
    [(0.8, 0.75, 0.5), (0.4, 1.5, None), (-0.1, None, None)],
)
def test_retention(baseline, retention, above):
    values = {"model": 0.6, "baseline": baseline, "random_weights": 0.4, "word_embeddings": 0.1}
    scores = {name: {"t": Score(value, 1.0)} for name, value in values.items()}
    task = _describe_task("t", scores, {}, 5)
    assert task["floor"] == 0.4
    assert task["retention"] == (None if retention is None else pytest.approx(retention))
    assert task["retention_above_floor"] == (None if above is None else pytest.approx(above))


def test_result_is_json_with_parameters_speed_and_versions(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    model, baseline = result["parameters"]["model"], result["parameters"]["baseline"]
    assert model["encoder"] * 2 == baseline["encoder"]
    assert model["embeddings"] == baseline["embeddings"]
    assert result["speed"]["throughput_texts_per_s"]["ratio"] > 0
    assert {"python", "torch", "transformers", "sentence-transformers"} <= set(result["versions"])


def test_without_baseline_there_is_no_retention_and_no_speed(small_folder, pairs):
    result = evaluate(str(small_folder), None, {"six": pairs}, device="cpu", max_length=8)
    (task,) = result["tasks"]
    assert result["speed"] is None
    assert result["parameters"]["baseline"] is None
    assert task["baseline"] is task["retention"] is task["retention_above_floor"] is None
    assert "also" not in task


def test_the_pruned_shape_and_the_baselines_words_make_the_floors(result, tiny_folder, pairs):
    alone = evaluate(str(tiny_folder), None, {"six": pairs}, device="cpu")
    floors, own = result["tasks"][0]["floors"], alone["tasks"][0]["floors"]
    assert floors["word_embeddings"] == pytest.approx(own["word_embeddings"])
    assert floors["random_weights"] != own["random_weights"]


def test_a_sentence_is_encoded_once(pairs):
    seen = []

    class Spy:
        def encode(self, texts, **kwargs):
            seen.extend(texts)
            return np.random.default_rng(0).normal(size=(len(texts), 4))

    score_sts(Spy(), {"six": pairs}, 32)
    assert len(seen) == len(set(seen)) == 10
    assert seen == unique_sentences({"six": pairs})


def test_max_length_shortens_only(tiny_folder):
    assert load_encoder(str(tiny_folder), max_length=5).max_seq_length == 5
    assert load_encoder(str(tiny_folder), max_length=500).max_seq_length == 32
    with pytest.raises(ValueError, match="max_length 0 leaves no token"):
        load_encoder(str(tiny_folder), max_length=0)


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no folder\. To fix"):
        load_encoder(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="a/b/c is no folder"):
        load_encoder("a/b/c")
    with pytest.raises(ValueError, match=r"has no modules\.json, so its pooling is unknown"):
        load_encoder(str(tmp_path))


def test_tasks_that_make_no_sense(tiny_folder, tiny_model, pairs):
    with pytest.raises(ValueError, match="no task to evaluate on"):
        evaluate(str(tiny_folder), None, {})
    with pytest.raises(ValueError, match=r"six: columns of \[6, 6, 5\] entries"):
        evaluate(str(tiny_folder), None, {"six": (pairs[0], pairs[1], pairs[2][:-1])})
    with pytest.raises(ValueError, match="flat: every gold score is 1"):
        score_sts(tiny_model, {"flat": (pairs[0], pairs[1], [1.0] * 6)}, 32)


def test_existing_file_is_kept(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json({"value": 1}, path)
    with pytest.raises(FileExistsError, match=r"results\.json exists.*--overwrite"):
        write_json({"value": 2}, path)
    assert json.loads(path.read_text()) == {"value": 1}
    write_json({"value": 2}, path, overwrite=True)
    assert json.loads(path.read_text()) == {"value": 2}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"value": float("nan")}, path, overwrite=True)
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'sentence_transformers', 'matplotlib'} & set(sys.modules)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPT.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--baseline" in done.stdout
    assert time.perf_counter() - start < 10  # 0.2 s when the machine is idle


def test_script_writes_what_evaluate_returns(tiny_folder, small_folder, pairs, tmp_path, capsys):
    file, output = tmp_path / "six.csv", tmp_path / "out" / "results.json"
    file.write_text("\n".join(f"{a},{b},{gold}" for a, b, gold in zip(*pairs, strict=True)))
    main = runpy.run_path(str(SCRIPT))["main"]
    arguments = [str(small_folder), "--baseline", str(tiny_folder), "--sts", str(file)]
    arguments += ["--also", f"whole={tiny_folder}", "--device", "cpu", "--no-speed"]
    arguments += ["--output", str(output)]
    assert main(arguments) == 0
    written = json.loads(output.read_text())
    (task,) = written["tasks"]
    assert (task["task"], task["also"]["whole"]) == ("six", task["baseline"])
    assert written["speed"] is None
    assert written["command"].startswith("python scripts/evaluate_model.py ")
    said = capsys.readouterr().out
    assert f"{task['value']:.4f}" in said
    assert "floor: word embeddings" in said
    assert main(arguments) == 1
    assert "exists. To fix" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--also", "nameless"])
    assert "'nameless' is not NAME=FOLDER" in capsys.readouterr().err
    assert main([*arguments, "--sts", str(file), str(file), "--overwrite"]) == 1
    assert "two STS files are called six" in capsys.readouterr().err


def test_the_seed_makes_the_random_floor(small_folder, pairs):
    def floors(seed):
        result = evaluate(str(small_folder), None, {"six": pairs}, device="cpu", seed=seed)
        assert result["seed"] == seed
        return result["tasks"][0]["floors"]

    first, again, other = floors(1), floors(1), floors(2)
    assert first == again
    assert first["random_weights"] != other["random_weights"]
    assert first["word_embeddings"] == other["word_embeddings"]


def test_limits_hold_for_every_model(small_folder, tiny_folder, pairs, monkeypatch):
    seen, sizes = [], []

    def spy(model, sts, batch_size):
        sizes.append(batch_size)
        # Of 6 tokens 4 are words: the fifth does not count, the fourth does.
        fifth = model.encode(["dog " * 4 + last for last in ("cat", "man")])
        fourth = model.encode(["dog " * 3 + last for last in ("cat", "man")])
        seen.append((np.allclose(*fifth, atol=1e-6), np.allclose(*fourth, atol=1e-3)))
        return {"six": Score(0.5, 1.0)}

    monkeypatch.setattr(evaluation, "score_sts", spy)
    options = {"max_length": 6, "batch_size": 7, "device": "cpu", "speed": False}
    models = str(small_folder), str(tiny_folder)
    evaluate(*models, {"six": pairs}, also={"whole": str(tiny_folder)}, **options)
    assert sizes == [7] * 5
    assert seen == [(True, False)] * 5


def test_the_batch_size_changes_no_score(small_folder, pairs):
    model = load_encoder(str(small_folder), device="cpu")
    one, many = (score_sts(model, {"six": pairs}, size)["six"].value for size in (1, 32))
    assert one == pytest.approx(many)


def test_several_tasks_are_scored_apart(small_folder, pairs):
    turned = (pairs[1], pairs[0], [5 - gold for gold in pairs[2]])
    result = evaluate(str(small_folder), None, {"six": pairs, "turned": turned}, device="cpu")
    six, other = result["tasks"]
    assert (six["task"], other["task"]) == ("six", "turned")
    assert other["value"] == pytest.approx(-six["value"])


def test_a_model_from_the_hub_has_no_heads_to_count(tiny_folder, tiny_model):
    local, hub = (_count(name, tiny_model) for name in (str(tiny_folder), "someone/tiny"))
    heads = 16 * 16 + 16 + 16 + 1
    assert (local["heads"], hub["heads"]) == (heads, 0)
    assert hub["total"] == local["total"] - heads
    assert {part: hub[part] for part in ("encoder", "embeddings", "pooler")} == {
        part: local[part] for part in ("encoder", "embeddings", "pooler")
    }


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        ([1.0, float("nan"), 2.0], "odd: 1 of 3 values of the gold score are not finite"),
        ([], r"odd: columns of \[3, 3, 0\] entries"),
    ],
)
def test_gold_scores_that_cannot_be_used(gold, message, tiny_folder):
    texts = ["a man", "the dog", "a cat"]
    with pytest.raises(ValueError, match=f"{message}.*To fix"):
        evaluate(str(tiny_folder), None, {"odd": (texts, texts[::-1], gold)}, device="cpu")


def test_a_task_needs_two_pairs(tiny_model):
    with pytest.raises(ValueError, match=r"few: 1 pairs have no correlation\. To fix, give at"):
        score_sts(tiny_model, {"few": (["a man"], ["a cat"], [1.0])}, 32)


def test_json_is_readable_in_every_language(tmp_path):
    write_json({"текст": "天气"}, tmp_path / "a.json")
    content = (tmp_path / "a.json").read_bytes().decode("utf-8")
    assert content == '{\n  "текст": "天气"\n}\n'


def test_a_text_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "first")

    def fill_the_disk(path, text, **_):
        with path.open("w") as stream:
            stream.write(text[:2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "a.txt", "second")
    assert (tmp_path / "a.txt").read_text() == "first"
