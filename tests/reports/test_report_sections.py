import pytest

from bge_pruning.reports.report_data import read_inputs
from bge_pruning.reports.report_pictures import CAPTIONS
from bge_pruning.reports.report_sections import render_sections


def render(inputs, pictures=tuple(CAPTIONS)):
    return "\n\n".join(render_sections(inputs, pictures))


def headings(text):
    return [line[3:] for line in text.splitlines() if line.startswith("## ")]


def test_every_section_in_order(inputs):
    text = render(inputs)
    assert text.startswith("# Pruned whole\n")
    assert headings(text) == [
        "Quality",
        "What was gained",
        "What was pruned",
        "How the constraint was met",
        "Training",
        "Recovery",
        "How to reproduce",
        "Configuration",
    ]
    assert [text.count(f"]({name})") for name in CAPTIONS] == [1] * len(CAPTIONS)
    assert "Left out" not in text


def test_the_numbers_are_said(inputs):
    text = render(inputs)
    assert "5.0 million parameters, 71.4% of the original's 7.0 million" in text
    assert "of the encoder it keeps 50.0%" in text
    assert "On stsb-en-test it scores 0.8100 against 0.8200: 98.8% is kept, and 96.8% of" in text
    assert "It encodes 1.80 times as many texts a second on cpu." in text
    for row in (
        "| score kept | 98.8% |",
        "| encoder parameters kept | 50.0% |",
        "| all parameters kept | 71.4% |",
        "| size on disk | 20.0 MB |",
        "| throughput | 1.80 x |",
        "| latency of one text | 0.50 x |",
        "| memory in use | 25.0 MB |",
        "| distillation alignment | 1 | 0.02564 |",
        "| dev | 0.7000 | 0.9000 | 0.9000 |",
    ):
        assert row in text


def test_commands_seeds_versions_and_configuration(inputs):
    text = render(inputs)
    assert "```bash\npython scripts/train.py a.yaml\npython b.py\n```" in text
    assert "Seed of the run 17, of the evaluation 0." in text
    assert "| version | of the run | of the evaluation |" in text
    assert "| python | 3.11.0 | 3.11.0 |" in text
    assert "| torch | - | 2.7.0 |" in text and "| mosaicml | 0.32.1 | - |" in text
    assert text.endswith("## Configuration\n\n```yaml\nrun_name: half\nseed: 17\n```")


def test_a_command_cannot_end_its_block(inputs):
    inputs.commands = ["cat <<'```'", "a < b & c | d"]
    assert "````bash\ncat <<'```'\na < b & c | d\n````" in render(inputs)


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ("evaluation.json", {"Quality"}),
        ("pruning.json", set()),
        ("metrics.jsonl", {"Training"}),
        ("metrics-recovery.jsonl", {"Recovery"}),
        ("config.yaml", {"Configuration"}),
        ("commands.txt", set()),
        ("gates.npz", set()),
    ],
)
def test_a_missing_file_costs_its_section_and_is_named(missing, gone, results):
    everything = headings(render(read_inputs(results)))
    (results / missing).unlink()
    inputs = read_inputs(results)
    drawn = {
        "evaluation.json": {"summary.png", "scores.png"},
        "metrics.jsonl": {"constraint.png", "multipliers.png", "training.png"},
        "metrics-recovery.jsonl": {"recovery.png"},
        "gates.npz": {"gates.png"},
    }
    text = render(inputs, set(CAPTIONS) - drawn.get(missing, set()))
    assert set(everything) - set(headings(text)) == gone
    assert text.endswith(f"Left out, because the folder does not hold them: {missing}.")


def test_without_pictures_there_are_none(inputs):
    assert "![" not in render(inputs, ())


# A run that was not extracted


def test_a_training_run(run_folder):
    inputs = read_inputs(run_folder)
    inputs.config["model"] = {"base_model": "BAAI/bge-m3"}
    text = render(inputs, ("gates.png", "constraint.png", "multipliers.png", "training.png"))
    assert text.startswith(
        "# Training run my-run\n\nAfter 39 batches of pruning from BAAI/bge-m3: "
    )
    assert headings(text) == [
        "What was pruned",
        "How the constraint was met",
        "Training",
        "How to reproduce",
        "Configuration",
    ]
    assert "Seed of the run 17." in text
    assert "| version | of the run |" in text and "| torch | 2.7.0 |" in text


def test_a_training_run_without_gates_and_before_any_step(run_folder):
    for name in ("gates.npz", "config.yaml", "versions.json"):
        (run_folder / name).unlink()
    (run_folder / "metrics.jsonl").write_text("")
    text = render(read_inputs(run_folder), ())
    assert "After 0 batches of training without gates: what is known from training alone." in text
    assert headings(text) == ["How to reproduce"]


# Scores


def test_an_evaluation_alone(inputs, make_evaluation, make_entry):
    inputs.pruning = None
    alone = make_entry(baseline=None, retention=None, retention_above_floor=None)
    inputs.evaluation = make_evaluation([alone])
    inputs.evaluation["parameters"]["baseline"] = None
    inputs.evaluation["speed"] = None
    text = render(inputs)
    assert text.startswith("# Evaluation of half\n")
    assert "On stsb-en-test it scores 0.8100 (floor 0.5100)." in text
    assert "at a glance" in text and "score kept" not in text


def test_a_few_scores_are_said_one_by_one(inputs, make_evaluation, make_entry):
    other = make_entry("de", "sparse", value=0.41, retention=0.5, retention_above_floor=None)
    inputs.evaluation = make_evaluation([make_entry(), other])
    text = render(inputs)
    assert "On de, sparse it scores 0.4100 against 0.8200: 50.0% is kept. It encodes" in text
    assert "| score kept, median of 2 | 74.4% |" in text


def test_many_scores_are_said_by_their_median_and_ends(inputs, make_evaluation, make_entry):
    scores = [make_entry(f"t{n}", "all", retention=0.8 + n / 100) for n in range(9)]
    inputs.evaluation = make_evaluation(scores)
    assert (
        "Over 9 scores the median keeps 84.0% of the original's, the worst 80.0% (t0, all), the "
        "best 88.0% (t8, all)." in render(inputs)
    )


def test_many_scores_without_a_baseline(inputs, make_evaluation, make_entry):
    scores = [make_entry(f"t{n}", baseline=None, retention=None) for n in range(9)]
    inputs.evaluation = make_evaluation(scores)
    assert render(inputs).count("it scores") == 3


def test_no_score_at_all(inputs, make_evaluation):
    inputs.evaluation = make_evaluation([])
    assert "Quality" not in headings(render(inputs))


def test_names_from_the_data_are_escaped(inputs, make_evaluation, make_entry):
    inputs.pruning["source"]["base_model"] = "models/модель <b>"
    inputs.evaluation = make_evaluation([make_entry("a|b <i>")])
    text = render(inputs)
    assert text.startswith("# Pruned модель \\<b\\>\n")
    assert r"On a\|b \<i\> it scores" in text
