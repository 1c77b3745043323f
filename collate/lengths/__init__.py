"""What lives here: lengths, mask and permutation of a batch: checked when it is made, and compared at each use.

May import: `tensors`, and `collate.errors` and `collate.widths`.
Words: the *permutation* holds the sample index of each row; a *snapshot* is a copy from when the batch was made;
*declared* lengths are those that a sample states.
"""
