"""tcjax: train learned visual-token compressors between a frozen vision tower and a frozen LLM."""

__version__ = "0.1.0"
