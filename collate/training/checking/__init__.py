"""What lives here: `check_step`: a user's training step, run on changed batches to see whether it respects lengths.

May import: `collate.training.restore` and the rooms below `collate.training`.
Words: a *variant* is a changed batch; a *probe* compares variants; a *term* is one loss of a step; *drift* is the
largest relative change; a *dead step* is a real time step that no loss depends on; a *finding* is a broken law.
"""
