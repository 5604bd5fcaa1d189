"""The public name of ``fastgpt.training.step.Step``."""

from fastgpt.training.step import Step

__all__ = ["Step"]
