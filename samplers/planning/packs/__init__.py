"""Rows of a fixed capacity, filled with whole documents: planned again in each epoch, and always as many rows.

Files in the order of the work: documents, length_classes, best_fit, groups, ladder, row_count, recipes, pack_table,
row_order; one_list packs without epochs. They import NumPy, `collate.errors`, `collate.widths` and `keyed_shuffle`.
Words: a length class is a run of neighbouring lengths, a slot a position in a row that any document of its class can
take, a group the rows that were filled alike so far, a recipe the slots of one row. Sizes are in units of `multiple`
steps.
"""
