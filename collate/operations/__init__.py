"""What lives here: the bodies of a batch's methods, as functions: construction, pieces, views, sending and saving.

May import: `lengths`, `packing`, `padding`, `tensors`, and `collate.errors` and `collate.widths`; not `collate.batch`.
Words: a *trusted* batch is made of parts that agree; an *unchecked* one of any leaves; a *piece* has some of the rows,
a *chunk* some of the time steps; an *offset* is where a row starts among all real time steps.
"""
