"""A list of runs, one row each, and the report made from the rows alone."""
