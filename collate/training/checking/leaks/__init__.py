"""What lives here: the part of `check_step` for rows of documents: does the content of one document reach another?

May import: the files of `collate.training.checking`, and what they may.
Words: documents are *changed* where they get other contents of the same lengths; the others *stay*. An *entry* is a
number or a vector of a result that belongs to one document. A *meeting* is a module in which documents meet on purpose.
"""
