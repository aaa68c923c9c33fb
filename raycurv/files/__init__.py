"""What a run leaves behind: a store, checksummed tensors, Parquet tables, run.json."""
