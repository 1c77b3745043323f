"""Several sequences ("documents") in one row: the batch, its collator, and the integers that kernels want.

Imports: the files of `collate` and its rooms `lengths` and `tensors`. The room `training` runs on both kinds of batch.
Words: a document is one sample's sequence. A row has a capacity of C steps and holds documents one after the other,
each from a multiple of `align` on. A gap is a run of steps without a document. A segment is a document or a gap. A
slot is an entry of a table of segments; their number is fixed for a run, so that compiled code sees one shape.
"""
