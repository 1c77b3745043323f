"""Mixtures: several sources in one plan, by shares that are exact in tokens, samples or padded tokens.

Contents: `mixture` (what users give), `dataset` (their data, joined), `shares` (whose turn it is), `streams` (batches
of a source, pass after pass), `sequence` (an epoch's batches of all sources, in order), `blending` (batches of several
sources), `mixed_plan` (all of it), `report`; `bucketed` and `packed` are its tables, `epochs` has `plan_epoch`. It
imports `planning`.
Words: *source* (a corpus with a name), *unit* (what shares count), *pass* (all samples of a source, each once),
*stream* (the passes of a source, one after the other), *turn* (W batches of a source), *stage* (what was taken from
each source when a mixture took over from another).
"""
