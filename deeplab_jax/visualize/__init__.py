"""Label maps, samples and results as pictures."""
