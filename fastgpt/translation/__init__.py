"""Translation with ``fastgpt.seq2seq``: data, training, search."""
