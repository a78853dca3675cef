"""What travels in an artifact: one PyTorch file per compressor family, importing torch only, and the check of a folder.

A twin keeps no tensors but its parameters. Loaders that build on the meta device (Hugging Face's `from_pretrained`)
replace non-persistent buffers by uninitialised memory, so a table is computed in `forward`.
"""
