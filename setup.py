"""Packages only; the metadata stands in pyproject.toml.

The kernels live in ``kernels/`` and are installed as ``fastgpt.kernels``: the top-level name
``kernels`` belongs to another library.
"""

from setuptools import setup

setup(
    packages=["fastgpt", "fastgpt.kernels"],
    package_dir={"fastgpt": "fastgpt", "fastgpt.kernels": "kernels"},
)
