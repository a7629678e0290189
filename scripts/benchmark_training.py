#!/usr/bin/env python
"""Measure a pruning step beside a step of plain fine-tuning, on the same batches.

    python scripts/benchmark_training.py experiments/checkpoints/minilm-xlmr \
        --texts data/sts/stsb-en-train.csv data/mteb/scifact-sample/corpus.jsonl

MODEL may be a configuration, such as configs/bge_m3/target_50pct.yaml: random weights of its
model's size are trained. A training keeps weights and AdamW's moments, up to 12 bytes a parameter;
what does not fit together is refused, with what would.

The trainings, all with AdamW and the same distillation loss on dense vectors:

plain    transformers' model, fine-tuned as a whole; the targets are ready on the device
gates    ours, with gates on all four axes; the targets are ready on the device
compiled gates, with the layers compiled (model.compile: true); not measured unless asked for
teacher  gates, and an unpruned teacher of the same size embeds every batch in the step
cached   gates, and the step reads the teacher's vectors from the mapped cache file, as training
         does with teacher.cache=true
whole    gates, and every step updates all rows of the table of words, as a sharded run does, not
         only those that it needs; not measured unless asked for
frozen   gates, with frozen embeddings; not measured unless asked for

The batches: texts cut to --fixed-length; random batches padded to their longest text; and batches
of texts of similar length. Trainings are interleaved on every batch. A step begins with token
ids of texts in memory and ends with changed weights.

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

from bge_pruning.workflows.measurement_commands import benchmark_training as main

if __name__ == "__main__":
    raise SystemExit(main())
