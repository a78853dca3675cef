"""One alphabet for every axis: `logits_BQN` is [batch, queries, visual tokens], in names, einsums and shardings alike.

A bare capital is also a size (`B, N, C = tokens_BNC.shape`). `tests/test_house.py` reads every einsum and compares
its letters with the suffixes of its operands; `sharding.py` maps letters to mesh axes.
"""

AXES = {
    "B": "batch",
    "Y": "pixel rows",
    "X": "pixel columns",
    "P": "pixel values of one patch",
    "H": "token-grid rows",
    "W": "token-grid columns",
    "N": "visual tokens, N = H * W, row-major",
    "C": "vision width",
    "E": "inner width",
    "I": "second inner width",
    "A": "width of one attention head",
    "Q": "tokens handed to the LLM (num_queries)",
    "D": "LLM width",
    "T": "text positions",
    "S": "whole sequence (query positions)",
    "M": "positions attended to (key positions)",
    "K": "attention heads",
    "J": "key/value heads",
    "G": "query heads that share one key/value head, K = J * G",
    "F": "feed-forward width",
    "V": "vocabulary",
    "L": "layers",
    "U": "rank of an update of low rank (LoRA)",
}
