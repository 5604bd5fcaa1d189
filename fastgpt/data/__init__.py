"""Data: text sources, preparation of data sets, token files, batches of token ids."""
