"""Progress: where an epoch stands, and who keeps that state.

Contents: `Position`, the cursors of a sampler (`epoch_cursor`) and of a stream in shared memory (`shared_cursor`), and
`PlannedLoader`, which both loaders inherit. It imports `planning` and `shards.skip_counts`. Its words: *iteration* (one
pass of a loader over an epoch or its remainder), *cursor* (which epoch comes next and where the present one stands),
*position* (a public dict from which any number of replicas resumes), *start* (where an iteration began).
"""
