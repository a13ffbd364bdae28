"""What setup.cfg can't say: the configs are installed inside the package; what a wheel is for."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel


class Wheel(bdist_wheel):
    """A wheel for one platform where the library that calls oneDNN has been built, else for any."""

    def finalize_options(self) -> None:
        """Says whether there is something compiled."""
        super().finalize_options()
        if any(Path("sire_jax/layers/onednn").glob("*.so")):
            self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        """Returns the tags of Python, its interface and the platform: no Python is compiled for."""
        *_, platform = super().get_tag()
        return "py3", "none", platform


setup(
    packages=[*find_packages(include=["sire_jax", "sire_jax.*"]), "sire_jax.configs"],
    package_dir={"sire_jax.configs": "configs"},
    cmdclass={"bdist_wheel": Wheel},
)
