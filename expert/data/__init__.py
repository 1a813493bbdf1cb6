"""Where training rows come from: captioned images in, memory-mapped shards out.

sources.py        what a source is, and the error a person meets when theirs has a fault
dicebear.py       the embedded source: drawn pictures with true captions
imagefolder.py    a person's own images with a metadata.jsonl or .csv
tables.py         parquet files with image bytes, folders saved by Hugging Face datasets
tars.py           webdataset's tar archives
folders.py        the folders below a folder, however deep
pictures.py       one picture of anyone's, decoded within bounds, or why it cannot be used
encoders.py       captions to token states, images to features and latents: the interfaces and the two defaults
published.py      AutoencoderKL, CLIP and DINOv2 by folder or hub name
asked_network.py  what a config may ask for before its network is made
weights_folder.py where published weights lie, loaded whole or not at all, and their digest
prepare.py        a source in, a shard folder out
shard_maker.py    one shard of it: decoded, encoded, sifted, written
unfinished.py     the folder of a run that has not ended, and what of it is finished
parts.py          parts made apart, joined
shards.py         the shard folder: its layout, and reading it
sharded_rows.py   rows across many files as one array larger than memory
"""
