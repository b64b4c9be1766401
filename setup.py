"""Puts the `configs/` folder inside the wheel as `neuralode/configs`; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["neuralode", "neuralode.*"]), "neuralode.configs"],
    package_dir={"neuralode.configs": "configs"},
    package_data={"neuralode": ["py.typed"], "neuralode.data": ["*.csv"], "neuralode.configs": ["**/*.yaml"]},
)
