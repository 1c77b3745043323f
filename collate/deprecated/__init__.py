"""Former names, which still work for one release.

What lives here: `names` takes arguments and attributes by their former names, with a warning; `modules` finds the
former modules that pickles name.
May import: nothing of `collate`; `samplers` takes `names` too.
Words: a former name is that of an earlier release, a present name is today's.
"""
