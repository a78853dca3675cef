"""Language models: seq_BSD -> hidden_BSD -> logits_BSV. They know neither towers nor compressors."""
