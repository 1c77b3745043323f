"""What lives here: tools on tensors, NumPy arrays and containers that know lengths but no batch.

May import: `collate.errors`.
Words: a *flat index* is `row * width + time step`; the *mask* is True where a time step is real; *bits* are the values
of dtypes that NumPy lacks, as integers; a *part* is an entry of a nested container.
"""
