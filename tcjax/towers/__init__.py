"""Vision towers: images_BYX3 -> tokens_BNC on a grid. They know neither compressors nor LLMs."""
