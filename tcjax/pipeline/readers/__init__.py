"""One file per format on disk -> `Records` (tcjax/pipeline/sample.py)."""
