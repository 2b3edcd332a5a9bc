"""Images from disk to device batches."""
