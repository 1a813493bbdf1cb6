"""Where training rows come from: captioned images in, memory-mapped shards out.

sources.py      what a source is, and the error a person meets when theirs has a fault
dicebear.py     the embedded source: drawn pictures with true captions
imagefolder.py  a person's own images with a metadata.jsonl or .csv
tables.py       parquet files with image bytes, folders saved by Hugging Face datasets
tars.py         webdataset's tar archives
pictures.py     one picture of anyone's, decoded within bounds, or why it cannot be used
encoders.py     captions to token states, images to features; both pinned by digest
prepare.py      a source in, a shard folder out
shards.py       the shard folder: its layout, and reading it
"""
