"""Command lines that measure speed, run a study, and put results side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bge_pruning.reports.efficiency_table import UNCOMPILED
from bge_pruning.utils.files import refuse_existing
from bge_pruning.utils.guard import run_command, say
from bge_pruning.utils.records import TRAININGS
from bge_pruning.workflows.model_commands import add_output_arguments, check_output, write_output


def benchmark(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Measure how fast a model is beside its original, and the share of the ideal speed-up."""
    parser = argparse.ArgumentParser(prog=prog, description=benchmark.__doc__)
    parser.add_argument(
        "model", help="folder, hub name, ONNX file, or a configuration (.yaml): its target shape"
    )
    parser.add_argument(
        "--baseline", help="the same of the original (of a configuration: its source shape)"
    )
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument(
        "--runtimes",
        nargs="+",
        choices=("torch", "compile", "onnx"),
        help="PyTorch, torch.compile, ONNX Runtime (default: torch; onnx for an ONNX file)",
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32], metavar="N")
    parser.add_argument("--lengths", nargs="+", type=int, default=[16, 128, 512], metavar="T")
    parser.add_argument("--texts", nargs="+", default=[], metavar="FILE", help="real lengths too")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of each setting (default: %(default)s)"
    )
    add_output_arguments(parser)
    args = parser.parse_args(argv)
    if min(*args.batch_sizes, *args.lengths, args.seconds) <= 0:
        parser.error("batch sizes, lengths and seconds must be above 0")
    return run_command(lambda: _benchmark(args))


def _benchmark(args: argparse.Namespace) -> None:
    """Measure, print, write."""
    from bge_pruning.datasets.sts_dataloader import read_texts
    from bge_pruning.reports.efficiency_table import render_efficiency
    from bge_pruning.workflows import efficiency_benchmark

    check_output(args)
    candidates = efficiency_benchmark.find_candidates(args.model, args.baseline)
    result = efficiency_benchmark.benchmark(
        candidates,
        efficiency_benchmark.choose_runtimes(candidates, args.runtimes),
        args.dtype,
        args.device,
        args.batch_sizes,
        args.lengths,
        read_texts(args.texts),
        args.seconds,
    )
    say(render_efficiency(result))
    write_output(args, result)


def benchmark_training(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Measure a pruning step beside a step of plain fine-tuning, on the same batches."""
    parser = argparse.ArgumentParser(prog=prog, description=benchmark_training.__doc__)
    parser.add_argument(
        "model", help="folder or hub name of the model, or a configuration (.yaml) for random ones"
    )
    parser.add_argument(
        "--texts", nargs="+", required=True, metavar="FILE", help="texts of mixed lengths"
    )
    parser.add_argument(
        "--trainings",
        nargs="+",
        choices=tuple(TRAININGS),
        default=UNCOMPILED,
        help="which to measure; a ratio needs both of its trainings (default: all but compiled)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="texts (default: %(default)s)")
    parser.add_argument(
        "--max-length", type=int, default=256, help="cut texts here (default: %(default)s tokens)"
    )
    parser.add_argument(
        "--fixed-length",
        type=int,
        default=128,
        help="of the batches without padding (default: %(default)s tokens)",
    )
    parser.add_argument("--steps", type=int, default=12, help="of each kind (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of products (default: fp32)"
    )
    add_output_arguments(parser)
    args = parser.parse_args(argv)
    numbers = (args.batch_size, args.max_length, args.fixed_length, args.steps)
    if min(numbers) < 1:
        parser.error("sizes, lengths and steps must be above 0")
    return run_command(lambda: _benchmark_training(args))


def _benchmark_training(args: argparse.Namespace) -> None:
    """Measure, print, write."""
    import torch

    from bge_pruning.datasets.embedding_dataset import build_tokenizer, tokenize
    from bge_pruning.datasets.sts_dataloader import read_texts
    from bge_pruning.models.encoder_shape import count_parameters
    from bge_pruning.reports.efficiency_table import render_training
    from bge_pruning.utils.environment import collect_versions, describe_machine
    from bge_pruning.workflows.training_benchmark import load_model, measure_training

    check_output(args)
    texts = read_texts(args.texts, args.batch_size * args.steps)
    base = load_model(args.model, texts)
    length = min(args.max_length, base.max_seq_length)
    fixed = min(args.fixed_length, length)
    found = measure_training(
        base,
        tokenize(texts, build_tokenizer(base.tokenizer_files["tokenizer.json"], length)),
        args.batch_size,
        fixed,
        args.steps,
        args.device,
        args.dtype == "bf16",
        [name for name in TRAININGS if name in args.trainings],
        lambda line: say(line, sys.stderr),
    )
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
    write_output(args, result)


def study(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a grid of methods, sizes and seeds; write what each keeps as a table and a picture."""
    parser = argparse.ArgumentParser(prog=prog, description=study.__doc__)
    parser.add_argument(
        "study", type=Path, help="YAML file, or a shipped one such as quality/study"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUES",
        help="run a part: method=, size= or seed= with values separated by commas",
    )
    parser.add_argument(
        "--report-only", action="store_true", help="run nothing; write the report of what is there"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="run cells again that were finished with another configuration",
    )
    args = parser.parse_args(argv)
    return run_command(lambda: _study(args))


def _study(args: argparse.Namespace) -> None:
    """Run what is not finished, and write the report of all that is."""
    from bge_pruning.reports.comparison_report import write_study_report
    from bge_pruning.workflows.study_file import read_study

    study = read_study(args.study)
    if not args.report_only:
        from bge_pruning.workflows.study import run_study

        if not run_study(study, args.only, args.overwrite):
            say("all cells are being run by other processes, which will write the report")
            return
    say(f"wrote {write_study_report(study.results)}")


def compare(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Put several evaluated models in one table and one picture: quality against size and time."""
    parser = argparse.ArgumentParser(prog=prog, description=compare.__doc__)
    parser.add_argument("results", nargs="+", metavar="[NAME=]PATH", help="evaluated models")
    parser.add_argument("--output", required=True, type=Path, help="folder to write into")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier comparison")
    args = parser.parse_args(argv)
    return run_command(lambda: _compare(args))


def _compare(args: argparse.Namespace) -> None:
    """Read, write and show."""
    from rich.console import Console

    from bge_pruning.reports.comparison_report import write_comparison
    from bge_pruning.reports.console import show_comparison

    candidates, keys = write_comparison(args.results, args.output, args.overwrite)
    show_comparison(candidates, Console(highlight=False))
    say(f"scores compared: {len(keys)}; written to {args.output}")


def report(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Write report.md, its pictures and report.html from the files of a results or run folder."""
    parser = argparse.ArgumentParser(prog=prog, description=report.__doc__)
    parser.add_argument(
        "results_folder",
        help="holds evaluation.json and what else the run wrote; a run folder works too",
    )
    parser.add_argument(
        "--command",
        action="append",
        default=[],
        help="a command that reproduces the run; may be repeated (default: those of commands.txt)",
    )
    parser.add_argument(
        "--run", type=Path, help="run folder, to copy what the report needs of it and its recovery"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing report")
    args = parser.parse_args(argv)
    return run_command(lambda: _report(args))


def _report(args: argparse.Namespace) -> None:
    """Collect what the report needs, and write it."""
    from bge_pruning.reports.report import MARKDOWN, write_report

    if args.run is not None:
        from bge_pruning.training.run_report import collect_run

        results = Path(args.results_folder)
        refuse_existing([results / MARKDOWN], overwrite=args.overwrite)  # before inputs change
        collect_run(results, args.run)
    path = write_report(args.results_folder, commands=args.command, overwrite=args.overwrite)
    say(f"wrote {path} and {path.with_suffix('.html')}")
