"""What lives here: memory for the values of large batches that a loader's workers send, used again and again.

May import: nothing of this package.
Words: a *slab* is a file in shared memory that holds the values of one tensor after another; a *lease* is the use of a
slab by one tensor, in one process, until nothing refers to its memory any more; the *keeper* is the process that keeps
a slab mapped between leases: the one that started the worker.

The law: what a tensor in a slab holds is never overwritten while a lease of it lasts, in any process.
"""
