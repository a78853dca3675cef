"""Files that travel in Hugging Face directories; they import torch and transformers, and tcjax never imports them."""
