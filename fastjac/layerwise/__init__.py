"""Layer-wise penalties: how the layers of a running model are seen, and the statistic of each."""
