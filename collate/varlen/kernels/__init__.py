"""What attention and scan kernels take of a varlen batch: block masks, dense masks, and keyword arguments by name.

Imports: the files of `collate/varlen`. `VarlenBatch` inherits its methods from `views`.
Words: a block is a square piece of an attention mask, `block_size` query steps by `block_size` key steps; it is *full*
where every pair in it is allowed, *partial* where some are. A kind of mask (`"causal"` and so on) says which pairs of
steps of one document are allowed. A step of a gap sees itself only, so that softmax never divides zero by zero.
"""
