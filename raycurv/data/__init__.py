"""Examples from files, data sets and frames, tokenised and packed into microbatches."""
