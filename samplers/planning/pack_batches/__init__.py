"""Rows of packs as the batches of an epoch: what a schedule, a plan and a position need.

Files in the order of the work: `options`, `cut_rows` (the order in which a collator cuts a list into the same rows),
`table`, `plan` and `report`. They import `planning`. Words: a *document* is a sample or a piece of one, a *row* holds
documents up to its capacity, a *batch* some rows; the *last rows* are those of the last, partial step.
"""
