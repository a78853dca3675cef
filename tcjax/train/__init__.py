"""Training: state, optimiser and step are pure; the loop owns clock, files and signals."""
