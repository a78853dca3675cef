"""Compressors: N visual tokens in, Q tokens of LLM width out. One readable file each; the contract is in base.py."""
