"""Data: images become a data set of shards, and shards become batches for the processes."""
