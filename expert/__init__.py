"""One expert: a flow-matching transformer trained on one cluster, in full isolation.

recipe.py      what is trained and how, as frozen records: model sizes, optimiser, schedule, objective
shape.py       how large a network may be, and how many numbers it holds, before one is built
memory.py      whether this machine has the memory for it
model.py       the network (DiT, AdaLN-Single or -Zero, cross-attention to caption states), published tensor names
packed_captions.py  captions without their padding, as a processor trains on them
objective.py   what the last layer says, on which noise path, and how that becomes one velocity
pretrained.py  a start from an ImageNet DiT's weights
flow.py        the path x_t = (1 - t) x_0 + t eps, its loss, and the scalar predictor an expert has to beat
rows.py        the rows of one cluster as batches that are a pure function of (seed, step)
task.py        what an expert's training step means: batch, loss, probe
optim.py       AdamW, or Muon on the matrices and AdamW on the rest
training.py    the loop for any task: a generator of frozen reports
checkpoint.py  folders on disk: atomic, strict on load, torn ones set aside by name
provenance.py  what a checkpoint says of its own training: rows, seed, recipe, machine
audit.py       how far published weights are from the same steps trained again, and what rounding explains of it
verify.py      are a peer's weights finite, and how well do they do on the plan's probe rows
data/          where rows come from: sources, encoders, shards

Nothing here prints, and nothing here knows the network.
"""
