"""The training step: variants, their measurement, tables and pictures."""
