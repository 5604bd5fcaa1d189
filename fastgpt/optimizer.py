"""The public name of ``fastgpt.training.optimizer.MasterAdamW``."""

from fastgpt.training.optimizer import MasterAdamW

__all__ = ["MasterAdamW"]
