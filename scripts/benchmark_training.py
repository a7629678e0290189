#!/usr/bin/env python
"""Measure a pruning step beside a step of plain fine-tuning, on the same batches.

python scripts/benchmark_training.py experiments/checkpoints/minilm-xlmr \
        --texts data/sts/stsb-en-train.csv data/mteb/scifact-sample/corpus.jsonl

MODEL may be a configuration, such as configs/bge_m3/target_50pct.yaml: random weights of its
model's size are trained. Every training keeps weights and AdamW's moments, 12 bytes a parameter;
what does not fit together is refused, with what would.

The trainings, all with AdamW and the same distillation loss on dense vectors:

plain    transformers' model, fine-tuned as a whole; the targets are ready on the device
gates    ours, with gates on all four axes; the targets are ready on the device
compiled gates, with the layers compiled (model.compile: true); not measured unless asked for
teacher  gates, and an unpruned teacher of the same size embeds every batch in the step
cached   gates, and the step reads the teacher's vectors from the mapped cache file, as training
         does with teacher.cache=true

The batches: texts cut to --fixed-length; random batches padded to their longest text; and batches
of texts of similar length. Trainings take turns on every batch. A step begins with the texts' token
ids in memory and ends with changed weights.

--output writes JSON:

model, random_weights              MODEL, and whether it is a configuration
shape, parameters                  its sizes in words; parameters of all parts
device, machine, threads, dtype    names of CPU and GPU; torch's threads; fp32 or bf16
batch_size, max_length             texts of a batch; tokens after which texts are cut
fixed_length, steps                tokens of a text of fixed length; steps of every cost
peak_flops                         operations per second of a large product, measured before and
                                   after every kind of batches: the fastest
costs                              one for every kind of batches and training:
  batches, training                "fixed length", "random batches" or "length groups"; see above
  seconds, data_seconds, tokens    of every step: all of it, making the batch, real tokens
  median_seconds, data_share       of these
  tokens_per_second, padding       real tokens; share of padding
  flops, utilisation               the trained model's for real tokens (no teacher, no padding),
                                   in all steps; and a second, as a share of peak_flops
  peak_bytes                       tensors of the widest step beside weights and moments
ratios                             by kind of batches, then training: [25 %, 50 %, 75 %] of the
                                   step time in times of: plain for gates and compiled, gates for
                                   the others
reading                            by kind of batches: [25 %, 50 %, 75 %] of what reading cached
                                   vectors takes, as a share of a step of gates
throughput                         by kind of batches: tokens/s of gates, in times of plain on
                                   random batches
limits                             what the ratios, and the throughput on length groups, are
                                   judged by
versions                           of Python and libraries
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bge_pruning.cli import run_command
from bge_pruning.reports.efficiency_table import UNCOMPILED
from bge_pruning.utils.records import TRAININGS


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
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
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    args = parser.parse_args(argv)
    numbers = (args.batch_size, args.max_length, args.fixed_length, args.steps)
    if min(numbers) < 1:
        parser.error("sizes, lengths and steps must be above 0")
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Measure, print, write."""
    import torch

    from bge_pruning.datasets.embedding_dataset import build_tokenizer, tokenize
    from bge_pruning.datasets.sts_dataloader import read_texts
    from bge_pruning.models.encoder_shape import count_parameters
    from bge_pruning.reports.efficiency_table import render_training
    from bge_pruning.utils.environment import collect_versions, describe_machine
    from bge_pruning.utils.files import refuse_existing, write_json
    from bge_pruning.workflows.training_benchmark import load_model, measure_training

    if args.output is not None:
        refuse_existing([args.output], overwrite=args.overwrite)
    texts = read_texts(args.texts, args.batch_size * args.steps)
    base = load_model(args.model, texts)
    shape = base.shape
    length = min(args.max_length, base.max_seq_length)
    fixed = min(args.fixed_length, length)
    tokens = tokenize(texts, build_tokenizer(base.tokenizer_files["tokenizer.json"], length))
    found = measure_training(
        base,
        tokens,
        args.batch_size,
        fixed,
        args.steps,
        args.device,
        args.dtype == "bf16",
        [name for name in TRAININGS if name in args.trainings],
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    result = {
        "model": args.model,
        "random_weights": args.model.endswith(".yaml"),
        "shape": shape.describe(),
        "parameters": int(count_parameters(shape).total),
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
    print(render_training(result))
    if args.output is not None:
        write_json(result, args.output, overwrite=args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
