"""What lives here: functions that run on batches: recurrent modules, losses, prefetching, the budget that fits memory.

May import: every other room of `collate` but `collate.collator`.
Words: a *training step* is the user's function; a *segment* is a run of time steps with the same number of rows; a
*budget* is `max_tokens`; *restored* is what has its former values after the call.
"""
