"""Images → data set → batches: what is prepared, read and dealt to the processes."""
