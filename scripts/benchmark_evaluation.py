#!/usr/bin/env python
"""Speed of embedding and of multi-vector scores beside sentence-transformers and FlagEmbedding.

python scripts/benchmark_evaluation.py experiments/checkpoints/minilm-xlmr
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bge_pruning.cli import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("--collection", default="data/mteb/scifact-sample", help="texts to embed")
    parser.add_argument("--split", default="train", help="judgements of the collection")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--texts", type=int, default=300, help="texts to embed")
    parser.add_argument("--rounds", type=int, default=5, help="the tools take turns")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument(
        "--large", type=int, default=0, metavar="N", help="also search a corpus of N passages"
    )
    args = parser.parse_args(argv)
    if min(args.texts, args.rounds) < 1 or args.large < 0:
        parser.error("--texts and --rounds must be above 0, --large not below")
    return run_command(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    from bge_pruning.datasets.retrieval_collection import read_collection
    from bge_pruning.evaluation.benchmark import (
        compare_encoding,
        compare_multi_vectors,
        compare_pair_scores,
        render_comparison,
        search_large_corpus,
    )
    from bge_pruning.evaluation.text_encoder import TextEncoder
    from bge_pruning.models.pretrained import load_base_model

    data = read_collection(args.collection, args.split)
    encoder = TextEncoder(load_base_model(args.model), args.device, args.max_length, 32)
    queries = [row["text"] for row in data.queries]
    passages = [row["text"] for row in data.corpus]
    half = args.texts // 2  # short and long ones
    texts = queries[:half] + passages[: args.texts - half]
    result = compare_encoding(args.model, encoder, texts, args.rounds)
    print(render_comparison(result, "sentence-transformers"))
    if "colbert_vecs" not in encoder.names():
        return
    result = compare_multi_vectors(encoder, queries[:100], passages[:40], args.rounds)
    print(render_comparison(result, "FlagEmbedding's loop"))
    result = compare_pair_scores(args.model, encoder, queries[:10], passages[:40], args.rounds)
    print(render_comparison(result, "FlagEmbedding's compute_score"))
    if args.large:
        found = search_large_corpus(encoder, queries[:128], passages, args.large)
        print(
            f"searching {found.passages:,} passages in mode all: {found.seconds:.0f} s, "
            f"{found.bytes / 2**30:.2f} GiB more memory"
        )


if __name__ == "__main__":
    sys.exit(main())
