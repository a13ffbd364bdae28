"""What setup.cfg can't say: the configs lie beside the package and are installed inside of it."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sire_jax", "sire_jax.*"]), "sire_jax.configs"],
    package_dir={"sire_jax.configs": "configs"},
)
