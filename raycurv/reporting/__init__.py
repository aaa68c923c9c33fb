"""The report of a run or of scores: one page, in one file, that a person reads in a browser."""
