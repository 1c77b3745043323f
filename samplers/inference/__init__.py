"""Inference over a corpus: every sample once, longest first, outputs in the order of the dataset, on disk if wanted.

Contents: `run_in_order`; the batches that remain (`plan`), the step that halves a batch (`halving`), what it returned
(`outputs`, `output_arrays`), where outputs are kept (`containers`, `run_folder`, `parts`) and the file they become
(`assemble`, `saved_result`). It imports `planning`, `progress`, `sources` and `shards.storage`, and of `collate` the
errors and `widths`; batches and collators come as arguments.
Terms: an *output* is what one sample gives; a *part* is a file of the outputs of one flush; a *run record* says which
run a file belongs to.
"""
