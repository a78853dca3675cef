"""Host side: prepared datasets on disk -> Batch. numpy, grain, PIL, a tokenizer; sees floor 0 only, knows no model."""
