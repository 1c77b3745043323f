"""What lives here: samples of one field -> padded values, and the options that say how.

May import: `tensors`, and `collate.errors` and `collate.widths`.
Words: a *row* is one sample's values `[L_i, *F]`; *width* is the number of padded time steps; a *shape* is
`(rows, width)`; a *tail* is the padding of one row; *clipped* rows are cut to `max_length`.
"""
