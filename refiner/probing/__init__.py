"""What a block knows: features, neighbors, probes and measures without labels."""
