"""How good drawn pictures are: distances between feature distributions, neighbours, captions kept, intervals, tables.

    frechet.py     FID: the Frechet distance of two Gaussians
    kernel.py      KID: unbiased squared MMD of a cubic kernel
    neighbours.py  improved precision and recall
    inception.py   the published extractor, from weights in a local folder
    measure.py     all of them for one set of pictures, beside the floor of real pictures
    intervals.py   mean and confidence interval over seeds
    tables.py      Markdown

Metrics take features float [n, F] and know no pictures; extractors take pictures uint8 [n, H, W, 3] and know no metric.
"""
