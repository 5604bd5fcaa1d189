"""From texts to batches of token ids: sources, preparation, token files, batches."""
