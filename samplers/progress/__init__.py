"""Progress: where an epoch stands, and who keeps that state.

Contents: `Position`, the cursors of a sampler (`epoch_cursor`) and of a stream in shared memory (`shared_cursor`),
`PlannedLoader`, which both loaders inherit, and readers of planned steps (`read_ahead`, `window_reader`,
`stream_iterator`); `mixtures` has streams of several corpora. It imports
`planning` and `shards`. Its words: *iteration* (one pass of a loader over an epoch or its remainder), *cursor* (which
epoch comes next and where the present one stands), *position* (a public dict from which any number of replicas
resumes), *start* (where an iteration began).
"""
