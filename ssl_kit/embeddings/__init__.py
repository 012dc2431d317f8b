"""The folder that `ssl-kit embed` writes: vectors with ids, and the index over them.

folder.py       its Parquet parts: written, and read (whole, in blocks, single rows)
store.py        makes the folder part by part; goes on where it was stopped
embeddings.py   Embeddings: all of one in memory, with `load` and `save`; `embed` makes them of images
exact.py        exact search: FAISS on the CPU, torch elsewhere
index.py        FAISS indexes: built, tuned, measured
signing.py      index files and whose they are
filling.py      an index filled by several processes
by_ray.py       parts made by workers of Ray
search.py       Index: images in, neighbours out

torch is imported here, since it must come before faiss: two OpenMP runtimes, and this order is the one that works. Only
a process that does without torch for good (`core.light`) has faiss alone: it starts in a tenth of the time and memory.
"""

from ssl_kit import core

if not core.light:
    import torch  # noqa: F401
