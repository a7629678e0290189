"""What a run will do, said before it does it."""

import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoModel

from bge_pruning.config.load import ConfigError
from bge_pruning.datasets.mixed_dataloader import BatchSize
from bge_pruning.models.encoder_shape import count_parameters, forward_flops
from bge_pruning.training.plan import build_plan, example_target
from bge_pruning.training.plan_text import estimate_memory, render_memory, render_plan

L0 = "model.l0_module."
NO_TARGET = f"{L0}target_model=null"
HALF = (NO_TARGET, f"{L0}target_density=0.5")
HUB = ("model.base_model=BAAI/bge-m3", "model.d_model=1024", "model.n_heads=16")
SENTENCES = "data.train=[{name: a, kind: sentences, path: a.txt}]"
PASSAGES = (
    *(NO_TARGET, "model.l0_module.target_density=0.5", "data.negatives=1"),
    "data.train=[{name: a, kind: contrastive, path: a.jsonl}]",
    *("loss.contrastive=1", "loss.contrastive_outputs=[dense,sparse,colbert]"),
    "model.max_length=512",
)
HUB_REST = ("model.n_layers=24", "model.intermediate_size=4096", "model.vocab_size=250002")


@pytest.fixture
def plan(configure):
    """A function from overrides to plan and configuration."""

    def plan(*overrides: str):
        config = configure(*overrides)
        return build_plan(config), config

    return plan


def test_stages_of_the_data_are_told(plan):
    stages = "data.stages=[{steps: 1, weights: {a: 1, b: 3}}, {until: 1dur}]"
    both = "data.train=[{name: a, kind: sts, path: a.csv}, {name: b, kind: sts, path: b.csv}]"
    text = render_plan(*plan(both, stages, "max_duration=4ba"))
    assert "mixture      steps 1 to 1: a 25.0%, b 75.0%\nmixture      steps 2 to 4: all" in text
    # As many steps as the data have: not known before they are read.
    text = render_plan(*plan(both, stages, "max_duration=1ep"))
    assert "until +1ba: a 25.0%, b 75.0%\nmixture      until 1dur: all sources" in text


def test_text_holds_the_exact_counts(plan, model_folder):
    real = AutoModel.from_pretrained(model_folder)
    encoder = sum(p.numel() for p in real.encoder.parameters())
    embeddings = sum(p.numel() for p in real.embeddings.parameters())
    heads = 32 + 1 + 32 * 32 + 32
    total = sum(p.numel() for p in real.parameters()) + heads
    made, config = plan()
    target = count_parameters(made.target)
    text = render_plan(made, config)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["encoder"][:2] == [f"{encoder:,}", f"{target.encoder:,}"]
    assert rows["encoder"][2] == f"{target.encoder / encoder:.1%}"
    assert rows["embeddings"][0] == f"{embeddings:,}"
    assert rows["heads"][0] == f"{heads:,}"
    assert rows["total"][:2] == [f"{total:,}", f"{target.total:,}"]
    assert "target       3 layers, hidden 24, 3 heads, intermediate 48" in text
    assert "warm-up      target sparsity reached after 0.5dur" in text
    assert "gates start" not in text
    ordered = plan(f"{L0}init_order=activation", "baseline.calibration_texts=1500")
    assert "gates start  in the order of activation on 1,500 texts" in render_plan(*ordered)
    assert example_target(made) is made.target


def test_tokens_and_hours_of_both_stages(plan):
    """By hand: 2 operations a weight, and 4 for each of 512 tokens and 1024 dimensions."""
    sizes = ("max_duration=1000ba", "recovery.max_duration=2000ba", "global_train_batch_size=64")
    distilled = ("loss.sts_regression=0", "loss.distillation_alignment=1", SENTENCES)
    made, config = plan(*HUB, *HUB_REST, *HALF, "model.max_length=512", *sizes, *distilled)
    found = re.search(
        r"tokens +this run ([\d.]+), recovery ([\d.]+) million.*; on an H100 ([\d.]+) hours",
        render_plan(made, config),
    )
    assert found.groups()[:2] == ("32.8", "65.5")
    layer = 2 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * 512 * 1024
    kept = example_target(made)
    small = 2 * (4 * kept.hidden_size * 1024 + 2 * kept.hidden_size * kept.intermediate_size)
    small += 4 * 512 * kept.hidden_size
    whole, cut = 24 * layer, kept.num_hidden_layers * small
    operations = 32.768e6 * 4 * whole + 65.536e6 * (3 * cut + whole)
    assert float(found[3]) == pytest.approx(operations / 3.1e14 / 3600, abs=0.06)
    assert "H100" not in render_plan(*plan("max_duration=10ba"))
    assert "tokens " not in render_plan(*plan("method=magnitude"))  # it is cut at once
    mixed = "data.train=[{name: a, kind: sentences, path: a.txt, weight: 1}, {name: b, kind: sts,"
    mixed += " path: b.csv, weight: 3}]"  # of 1 and of 2 texts
    assert "tokens       this run 2.2, " in render_plan(*plan("max_duration=10000ba", mixed))


def test_text_of_a_budget(plan):
    made, config = plan(*HALF)
    budget = 0.5 * count_parameters(made.source).encoder
    assert made.target is None
    assert made.target_parameters == budget
    text = render_plan(made, config)
    assert f"target       {budget:,.0f} encoder parameters (50.0%); the gates choose among" in text
    assert "(scripts/choose_shape.py measures which keep most)" in text
    shown = re.search(r"for example  (\d+) layers, hidden (\d+), (\d+) heads", text)
    assert int(shown[2]) == 8 * int(shown[3])
    shape = example_target(made)
    assert f"for example  {shape.describe()}" in text
    kept = count_parameters(shape)
    assert kept.encoder == pytest.approx(budget, rel=0.01)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["parameters"] == ["source", "example", "kept"]
    shown = [rows[part][1] for part in ("encoder", "total")]
    assert shown == [f"{kept.encoder:,}", f"{kept.total:,}"]


TINY = "{d_model: 8, n_heads: 1, n_layers: 1, intermediate_size: 64}"


@pytest.mark.parametrize(
    "target", ["target_density=0.09", "target_speedup=12", f"target_model={TINY}"]
)
def test_a_target_that_leaves_little_is_warned_of(target, plan):
    text = render_plan(*plan(f"{L0}{target}"))
    assert re.search(r"^warning +only [0-9]\.\d% of the encoder stay; below 10% ", text, re.M)
    assert "warning" not in render_plan(*plan(f"{L0}target_density=0.11"))


def test_intervals_beyond_the_run_are_said(plan):
    text = render_plan(*plan("max_duration=4ba", "eval_interval=5ba", "save_interval=3ba"))
    assert "steps        4 = 4ba (batch 8), evaluated at the end, saved every 3ba" in text


@pytest.mark.parametrize("length", [8, 1024])
def test_text_of_a_speedup(plan, length):
    made, config = plan(NO_TARGET, f"{L0}target_speedup=2", f"{L0}target_length={length}")
    assert made.target is made.target_parameters is None
    text = render_plan(made, config)
    wanted = f"target       2 times fewer operations for a text of {length:,} tokens; the gates"
    assert f"{wanted} choose among" in text
    shape = example_target(made)
    assert f"for example  {shape.describe()}" in text
    fewer = forward_flops(made.source, [length]) / forward_flops(shape, [length])
    assert fewer == pytest.approx(2.0, rel=0.01)


def test_text_without_gates(plan):
    made, config = plan("model.l0_module=null")
    text = render_plan(made, config)
    assert "gates on     nothing: ordinary training" in text
    assert "target" not in text and example_target(made) is None
    assert f"{count_parameters(made.source).total:,}" in text


def test_sources_whose_own_negatives_are_the_only_ones_are_named(plan):
    docs = "{name: docs, kind: contrastive, path: x, negatives: 3, in_batch_negatives: false}"
    text = render_plan(*plan(f"data.train=[{docs}, {{name: pairs, kind: sts, path: y}}]"))
    assert "negatives    docs: 3 of its own a query, none of the batch" in text
    assert text.count("negatives ") == 1


def test_lines_of_a_source_are_said(plan):
    source = "{name: a, kind: sentences, path: 'x/*.txt', lines: ':-400'}"
    text = render_plan(*plan(f"data.train=[{source}]", *HALF))
    assert "\nlines        a: :-400 of each file of x/*.txt\n" in text


def test_only_axes_that_shrink_get_gates(plan):
    sizes = "{d_model: null, n_heads: null, n_layers: 2, intermediate_size: 64}"
    made, _ = plan(f"{L0}target_model={sizes}", f"{L0}target_length=300")
    assert made.axes == ("layer",)
    assert made.target is not None and made.target_length == 300


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.d_model=40",), r"model.d_model is 40, but .*config.json says 32. To fix, set"),
        (("model.n_layers=5",), "model.n_layers is 5, but .* says 4"),
        (("model.vocab_size=98",), "model.vocab_size is 98, but .* says 99"),
        (HUB, r"not a local folder, and model.n_layers, model.intermediate_size, model.vocab_size"),
        ((*HUB, *HUB_REST, "model.n_heads=15"), "1024 is not a multiple of model.n_heads 15"),
        (("model.base_model=no/where",), "'no/where' is not a local folder"),
        (
            (f"{L0}target_model={{d_model: 32, n_heads: 4, n_layers: 4, intermediate_size: 64}}",),
            "the target is the source: nothing would be pruned. To fix, choose smaller",
        ),
        (
            (f"{L0}pruning_modules=[head,hidden]",),
            "the target changes intermediate, layer, which pruning_modules does not name. To fix",
        ),
        (
            (f"{L0}pruning_modules=[heads]",),
            r"pruning_modules\[0\] 'heads' is not one of \('head', 'intermediate', 'layer', 'h",
        ),
        (
            (f"{L0}target_model.n_heads=2",),
            r"num_attention_heads 2 with head_dim 8 needs d_model 16, not 24: transformers could "
            r"not load the result. To fix, set d_model=16 with n_heads=2 or d_model=24 with "
            r"n_heads=3",
        ),
        ((f"{L0}target_model.n_layers=5",), r"target n_layers 5 is not in \[1, 4\]"),
        (
            (f"{L0}target_model.vocab_size=50",),
            "target vocab_size 50 differs from the source's 99: the vocabulary has no gates",
        ),
        (
            (*HALF, f"{L0}pruning_modules=[head,layer]"),
            "'head' and 'hidden' can be exported only together",
        ),
        (
            (NO_TARGET, f"{L0}target_density=0.4", f"{L0}pruning_modules=[layer]"),
            "no exportable shape that differs only in layer is within 1 % of",
        ),
        (
            (NO_TARGET, f"{L0}target_speedup=2.2", f"{L0}pruning_modules=[layer]"),
            r"is within 1 % of a speed-up of 2\.2 at 128 tokens; the nearest has 2\.000",
        ),
        (
            (NO_TARGET, f"{L0}target_parameters=1e9"),
            r"a budget of 1,000,000,000 encoder parameters is not in \(0, ",
        ),
        ((*HALF, f"{L0}pruning_modules=[]"), "pruning_modules"),
    ],
)
def test_refused_before_anything_is_done(overrides, message, plan):
    with pytest.raises(ConfigError, match=message):
        plan(*overrides)


def test_hub_model_is_planned_from_the_yaml(plan):
    made, config = plan(*HUB, *HUB_REST, *HALF)
    assert count_parameters(made.source).encoder == 302_309_376
    assert count_parameters(made.source).total == 567_754_752 + 1_025 + 1_024 * 1_025
    assert "8194 positions, pooler and all heads, as BGE-M3" in render_plan(made, config)


def test_new_heads_are_counted(plan, model_folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare, ignore=shutil.ignore_patterns("*.pt"))
    made, _ = plan(f"model.base_model={bare}")
    assert count_parameters(made.source).heads == 0
    made, _ = plan(f"model.base_model={bare}", "model.init_missing_heads=true")
    assert count_parameters(made.source).heads == 33 + 32 * 33


def test_memory_grows_with_what_takes_it(plan):
    def total(*overrides: str) -> float:
        return sum(estimate_memory(*plan(*overrides)).values())

    assert total("model.max_length=32") > total()
    assert total("device_train_microbatch_size=2") < total()
    # Until the data are known, the teacher may have to be in memory.
    assert total("teacher.cache=false") == total() > total("teacher.cache=true")
    assert total("precision=amp_bf16") < total()
    options = ("model.freeze_embeddings=true", "model.activation_checkpointing=true")
    one = [total(option) for option in options]
    assert total(*options) < min(one) and max(one) < total()


def gib(parts: dict[str, float]) -> str:
    return f"{sum(parts.values()) / 2**30:.1f}"


def test_memory_of_the_batches_that_there_are(plan):
    made, config = plan()
    sizes = (BatchSize(10, 2, 5), None, BatchSize(1_000_000, 2, 9))
    few, all_, many = (sum(estimate_memory(made, config, n).values()) for n in sizes)
    assert few <= all_ < many
    assert (
        f"memory       about {many / 2**30:.1f} GiB on the CPU in fp32, at once 8 rows x 2 texts "
        "of up to 9 tokens ("
    ) in render_memory(made, config, sizes[2])


def test_memory_of_each_of_many_ranks(plan, monkeypatch):
    """They share the rows; the gradients are there twice, and the passages of all of them."""
    made, config = plan(*HUB, *HUB_REST, *PASSAGES, "global_train_batch_size=64")
    alone = estimate_memory(made, config)
    monkeypatch.setenv("WORLD_SIZE", "8")
    parts = estimate_memory(made, config)
    s = made.source  # rows of words are exchanged when the activations are gone
    assert parts["exchange"] == 4.0 * (count_parameters(s).total - s.vocab_size * s.hidden_size)
    assert parts["activations or gradients"] == pytest.approx(
        alone["activations or gradients"] / 8, rel=0.1
    )
    assert parts["outputs and scores"] > 1.5 * alone["outputs and scores"] / 8
    assert "GiB on each of 8 CPUs in fp32, at once 8 rows x 3 texts of" in render_plan(made, config)


@pytest.mark.parametrize("compared", [1, 0], ids=["by the model", "by the trainer"])
def test_memory_of_a_batch_in_pieces(compared, plan):
    """Whoever splits it, the gradients of one piece are there with the activations of the next."""
    options = (
        *HUB,
        *HUB_REST,
        *PASSAGES,
        "loss.score_distillation=1",
        "global_train_batch_size=32",
    )
    options += (f"loss.contrastive={compared}", "loss.distillation_similarity=0")
    made, config = plan(*options, "device_train_microbatch_size=2")
    parts, whole = (
        estimate_memory(made, config),
        estimate_memory(*plan(*options)),
    )
    assert gib(parts) < gib(whole)
    # The words of one part have gradients.
    s, name = made.source, "activations and gradients"
    total = 4.0 * (count_parameters(s).total - s.vocab_size * s.hidden_size)
    assert parts[name] - total == pytest.approx(whole["activations or gradients"] / 16, rel=0.1)


def test_disk_holds_checkpoints_and_the_teachers_outputs(plan):
    options = (*HUB, *HUB_REST, *HALF, "model.max_length=512", "loss.distillation_colbert=1")
    text = render_plan(*plan(*options))
    # 12 bytes for each of 568,805,377 parameters; 2 x 1,024 for each token and 4,096 for the text.
    assert "disk         2 checkpoints of up to 6.4 GiB in " in text
    assert "the teacher's outputs in " in text and "up to 1,003.9 MiB for every 1,000 texts" in text
    assert "teacher's outputs" not in render_plan(*plan(*options, "teacher.cache=false"))


def test_the_table_in_the_docs_is_the_plans(plan):
    """Texts of one row each, gates on all axes, float32, as the page says."""
    page = (Path(__file__).parents[2] / "docs" / "speed.md").read_text()
    section = page.partition("## Memory of training")[2].partition("\n## ")[0]
    header, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
    sizes = [re.match(r" *(\d+) x (\d+)", cell).groups() for cell in header.split("|")[2:-1]]
    assert len(sizes) == 3 and len(rows) == 4
    every = "model.freeze_embeddings=true", "model.activation_checkpointing=true"
    for row in rows:
        name, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        options = every if name == "both" else re.findall(r"`(.*?)`", name)
        for (texts, length), cell in zip(sizes, cells, strict=True):
            made, config = plan(
                *(*HUB, *HUB_REST, *HALF, *options, SENTENCES),
                *(f"global_train_batch_size={texts}", f"model.max_length={length}"),
                "teacher.cache=true",
            )
            assert f"{gib(estimate_memory(made, config))} GiB" == cell
            line = f"about {cell} on the CPU in fp32, at once {texts} rows x 1 text of up to"
            assert line in render_plan(made, config)
