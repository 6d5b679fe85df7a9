"""Before training: the filter of §5.1 and the negatives of §5.2. Skip it unless you make data."""
