"""Files on disk -> samples and batches."""
