"""Options found from data: widths from the lengths of a corpus, costs from steps that were timed."""
