"""Command lines that measure speed, run a study, and put results side by side."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from bge_pruning.reports.efficiency_table import USUAL
from bge_pruning.utils.files import refuse_existing
from bge_pruning.utils.guard import say
from bge_pruning.utils.records import TRAININGS
from bge_pruning.workflows import options as opt

ANY_MODEL = "folder, hub name, ONNX file, or a configuration (.yaml): its target shape"
RUNTIMES = "PyTorch, torch.compile, ONNX Runtime (default: torch; onnx for an ONNX file)"


@opt.command(
    opt.value("model", ANY_MODEL),
    opt.value("--baseline", "the same of the original (of a configuration: its source shape)"),
    opt.DEVICE,
    opt.value("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32"),
    opt.value("--runtimes", RUNTIMES, nargs="+", choices=("torch", "compile", "onnx")),
    opt.listed("--batch-sizes", metavar="N", type=int, default=[1, 32]),
    opt.listed("--lengths", metavar="T", type=int, default=[16, 128, 512]),
    opt.listed("--texts", "real lengths too"),
    opt.value("--seconds", "of each setting (default: %(default)s)", type=float, default=10.0),
    *opt.OUTPUT,
    check=opt.above_zero("batch sizes, lengths and seconds", "batch_sizes", "lengths", "seconds"),
    example="my-model --baseline BAAI/bge-m3 --batch-sizes 1 32",
)
def benchmark(args: argparse.Namespace) -> None:
    """Measure how fast a model is beside its original, and the share of the ideal speed-up."""
    from bge_pruning.datasets.sts_dataloader import read_texts
    from bge_pruning.reports.efficiency_table import render_efficiency
    from bge_pruning.workflows import efficiency_benchmark

    opt.check_output(args)
    candidates = efficiency_benchmark.find_candidates(args.model, args.baseline)
    runtimes = efficiency_benchmark.choose_runtimes(candidates, args.runtimes)
    sizes, texts = (args.batch_sizes, args.lengths), read_texts(args.texts)
    result = efficiency_benchmark.benchmark(
        candidates, runtimes, args.dtype, args.device, *sizes, texts, args.seconds
    )
    say(render_efficiency(result))
    opt.write_output(args, result)


WHICH = (
    "which to measure; a ratio needs both of its trainings (default: all but compiled, whole and "
    "frozen)"
)
CUT = "cut texts here (default: %(default)s tokens)"
FIXED = "of the batches without padding (default: %(default)s tokens)"


@opt.command(
    opt.value(
        "model", "folder or hub name of the model, or a configuration (.yaml) for random ones"
    ),
    opt.listed("--texts", "texts of mixed lengths", required=True),
    opt.value("--trainings", WHICH, nargs="+", choices=tuple(TRAININGS), default=USUAL),
    opt.value("--batch-size", "texts (default: %(default)s)", type=int, default=32),
    opt.value("--max-length", CUT, type=int, default=256),
    opt.value("--fixed-length", FIXED, type=int, default=128),
    opt.value("--steps", "of each kind (default: %(default)s)", type=int, default=12),
    opt.DEVICE,
    opt.value("--dtype", "of products (default: fp32)", choices=("fp32", "bf16"), default="fp32"),
    *opt.OUTPUT,
    check=opt.above_zero(
        "sizes, lengths and steps", "batch_size", "max_length", "fixed_length", "steps"
    ),
    example="bge_m3/target_60pct.yaml --texts data/sts/stsb-en-train.csv --device cuda",
)
def benchmark_training(args: argparse.Namespace) -> None:
    """Measure a pruning step beside a step of plain fine-tuning, on the same batches."""
    import torch

    from bge_pruning.datasets.embedding_dataset import build_tokenizer, tokenize
    from bge_pruning.datasets.sts_dataloader import read_texts
    from bge_pruning.models.encoder_shape import count_parameters
    from bge_pruning.reports.efficiency_table import render_training
    from bge_pruning.utils.environment import collect_versions, describe_machine
    from bge_pruning.workflows.training_benchmark import load_model, measure_training

    opt.check_output(args)
    texts = read_texts(args.texts, args.batch_size * args.steps)
    base = load_model(args.model, texts)
    length = min(args.max_length, base.max_seq_length)
    fixed = min(args.fixed_length, length)
    tokens = tokenize(texts, build_tokenizer(base.tokenizer_files["tokenizer.json"], length))
    names = [name for name in TRAININGS if name in args.trainings]
    sizes, half = (args.batch_size, fixed, args.steps), args.dtype == "bf16"
    report = partial(say, stream=sys.stderr)
    found = measure_training(base, tokens, *sizes, args.device, half, names, report)
    result = {
        "model": args.model,
        "random_weights": args.model.endswith(".yaml"),
        "shape": base.shape.describe(),
        "parameters": int(count_parameters(base.shape).total),
        "device": args.device,
        "machine": describe_machine(args.device),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "max_length": length,
        "fixed_length": fixed,
        "steps": args.steps,
        **found,
        "versions": collect_versions(),
    }
    say(render_training(result))
    opt.write_output(args, result)


PART = "run a part: method=, size= or seed= with values separated by commas"


@opt.command(
    opt.value("study", "YAML file, or a shipped one such as quality/study", type=Path),
    opt.listed("--only", PART, "KEY=VALUES", action="extend"),
    opt.flag("--report-only", "run nothing; write the report of what is there"),
    opt.flag("--overwrite", "run cells again that were finished with another configuration"),
    example="quality/study --only method=l0,layers seed=17",
)
def study(args: argparse.Namespace) -> None:
    """Run a grid of methods, sizes and seeds; write what each keeps as a table and a picture."""
    from bge_pruning.reports.comparison_report import write_study_report
    from bge_pruning.workflows.study_file import read_study

    study = read_study(args.study)
    if not args.report_only:
        from bge_pruning.workflows.study import run_study

        if not run_study(study, args.only, args.overwrite):
            say("all cells are being run by other processes, which will write the report")
            return
    say(f"wrote {write_study_report(study.results)}")


@opt.command(
    opt.value("results", "evaluated models", nargs="+", metavar="[NAME=]PATH"),
    opt.value("--output", "folder to write into", required=True, type=Path),
    opt.flag("--overwrite", "replace an earlier comparison"),
    example="original=whole.json half=results/half --output comparison",
    slow=False,
)
def compare(args: argparse.Namespace) -> None:
    """Put several evaluated models in one table and one picture: quality against size and time."""
    from bge_pruning.reports.comparison import describe_left_out
    from bge_pruning.reports.comparison_report import write_comparison
    from bge_pruning.reports.console import show_comparison

    found = write_comparison(args.results, args.output, args.overwrite)
    show_comparison(found.candidates)
    compared = ", ".join(f"{task} ({mode})" for task, mode in found.keys)
    notes = [f"Scores compared, {len(found.keys)}: {compared}.", *describe_left_out(found.left_out)]
    say("\n".join([*notes, f"wrote {args.output}"]))


REPRODUCES = "a command that reproduces the run; may be repeated (default: those of commands.txt)"


@opt.command(
    opt.value(
        "results_folder",
        "holds evaluation.json and what else the run wrote; a run folder works too",
    ),
    opt.value("--command", REPRODUCES, action="append", default=[]),
    opt.value(
        "--run", "run folder, to copy what the report needs of it and its recovery", type=Path
    ),
    opt.flag("--overwrite", "replace an existing report"),
    example="experiments/results/quickstart --overwrite",
    slow=False,
)
def report(args: argparse.Namespace) -> None:
    """Write report.md, its pictures and report.html from the files of a results or run folder."""
    from bge_pruning.reports.report import MARKDOWN, write_report

    if args.run is not None:
        from bge_pruning.training.run_report import collect_run

        results = Path(args.results_folder)
        refuse_existing([results / MARKDOWN], overwrite=args.overwrite)  # before inputs change
        collect_run(results, args.run)
    path = write_report(args.results_folder, commands=args.command, overwrite=args.overwrite)
    say(f"wrote {path} and {path.with_suffix('.html')}")
