"""Names and layouts of PyTorch checkpoints. Knows no model: others bring their tables of `Name`s."""
