#!/usr/bin/env python
"""Score a model on similarity and retrieval beside its baseline and two floors; measure its speed.

    python scripts/evaluate_model.py experiments/results/half --baseline BAAI/bge-m3 \
        --sts data/sts/stsb-en-test.csv --retrieval my/collection --modes dense sparse all \
        --output experiments/results/half/evaluation.json

A model is a folder, a run's folder or checkpoint, or a name on the Hugging Face hub. A task is a
file or folder, or the name that mteb has for it (STSBenchmark, STS17:en-de, SciFact), if there is a
network. Results go to the JSON file and to a Markdown table beside it.

The model card of an extracted model is written again, with the scores of an evaluation, and the
model is pushed to the hub:

    python scripts/evaluate_model.py my_small_model --card --evaluation evaluation.json \
        --push-to-hub me/my-small-model --private

The files are copied into the folder. With tasks, --card evaluates first.
"""

from bge_pruning.workflows.model_commands import evaluate as main

if __name__ == "__main__":
    raise SystemExit(main())
