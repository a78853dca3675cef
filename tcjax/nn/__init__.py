"""Bricks that two rooms use. Each carries its axis letters as metadata `axes`; none knows a mesh."""
