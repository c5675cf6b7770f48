"""What fits a run of a given size, and what cannot work: numbers in, proposals and warnings out."""
