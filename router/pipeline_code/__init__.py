"""Source of the code that lies in an assembled folder, so that diffusers alone can draw from it.

components.py      the experts and the router as diffusers components, read strictly
pipeline.py        DDMPipeline: prompt in, pictures with their provenance out
plain_blake3.py    BLAKE3 without a package: the seeds of a picture's noise are digests

`router.bundle` makes one self-contained file of each of the first two. Nothing else in this package imports them before
somebody asks for a pipeline (they import diffusers).
"""
