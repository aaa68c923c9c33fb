"""Rows of data -> examples: which columns are the inputs, tokens, lengths, labels."""
