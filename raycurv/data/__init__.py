"""Examples from Parquet, JSONL and Arrow, tokenised and packed into microbatches."""
