"""Everything that joins experts: the partition, the router, the ensemble, and the folder they are assembled in.

partition.py      features -> clusters, in two stages
figures.py        how well pictures keep to their prompt's cluster and colour
recipe.py         what a router is and how it is trained, as frozen records
model.py          the router network: CLS token over (x_t, t), the pooled caption in the time embedding
labelled_rows.py  rows with the cluster of each, in noised batches
task.py           its training task and its probe
ensemble.py       one routing decision a sample and step, samples grouped by expert, guidance inside each expert
samplers.py       solvers as generators that ask for velocities; noise that belongs to one picture
in_flight.py      pictures from noise to data: all in step, or each at its own pace where few experts fit in memory
draw.py           pictures from an ensemble, batch by batch, with a trace of who drew what
layout.py         where everything lies in an assembled folder
lock.py           the assembler's signature over every file of it
verify.py         is a folder what it was signed to be: offline, without torch
folder_errors.py  what can be wrong with one
folder_writing.py write it whole, or not at all
folder.py         open it only verified, sample
card.py           its model card
paris_layout.py   the released Paris layout, written; paris_import.py reads it
png.py            grids of pictures that carry their provenance

Nothing here prints, and nothing here knows the network.
"""
