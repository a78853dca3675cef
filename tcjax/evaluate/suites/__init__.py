"""The published benchmarks, one file each, from their published files; `question.py` says what a suite is."""
