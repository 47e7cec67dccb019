"""The three shapes of the Transformer, assembled from blocks."""
