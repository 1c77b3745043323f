"""Trainers of other projects with planned batches: `huggingface` (transformers) and `lightning`.

Each module is imported by its name, and imports its framework; nothing else of the project does. It imports the batch
samplers and `sources`; collators come as arguments.
Terms: a *plan* is a mapping of options of a batch sampler: of `PackingBatchSampler` if it names a `capacity`, else of
`LengthBucketBatchSampler`.
"""
