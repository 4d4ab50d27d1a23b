"""The packages: ``refiner``, and ``data`` as a part of it. All else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["refiner*"]), "refiner._data"],
    package_dir={"refiner._data": "data"},
    package_data={
        "refiner._data": ["*.csv", "*.json", "*.safetensors", "heads/*", "maps/*"],
        "refiner.visuals": ["*.js", "*.css"],
    },
    include_package_data=False,
)
