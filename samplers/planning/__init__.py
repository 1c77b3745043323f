"""Planning: lengths to batches, decided before any sample is read.

Contents: options, budget, sorting, tables (batches by id), schedule (dealt to replicas), plan, report. NumPy only; it
imports `collate.errors`, `collate.widths`, and the files `masked` and `deprecated`. Its words, each with one meaning:
*sample index* (in the dataset), *sorted index* (longest first), *batch id* (in a table), *position* (in the order of an
epoch), *slot* (step x W + rank, in a schedule); *run*, *bucket*, *stratum*, *variant*: see `tables.buckets`.
"""
