"""What setup.cfg can't say: where the configs lie, and what is compiled."""

import importlib.util
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup


def compiled() -> list[Extension]:
    """The library through which XLA calls oneDNN, where jaxlib and oneDNN are at hand.

    That is ``pip wheel --no-build-isolation .`` beside an installed ``sire_jax[onednn]``. A wheel
    without it builds it where it is first used.
    """
    jaxlib, data = importlib.util.find_spec("jaxlib"), Path(sysconfig.get_path("data"))
    onednn = data / "lib" / "libdnnl.so.3"
    if jaxlib is None or not onednn.exists():
        return []
    return [
        Extension(
            "sire_jax.layers.onednn._convolution",
            ["sire_jax/layers/onednn/convolution.cc"],
            include_dirs=[str(Path(jaxlib.origin).parent / "include"), str(data / "include")],
            extra_compile_args=["-O2", "-std=c++17", "-w"],
            extra_link_args=[str(onednn)],
            optional=True,
        )
    ]


setup(
    packages=[*find_packages(include=["sire_jax", "sire_jax.*"]), "sire_jax.configs"],
    package_dir={"sire_jax.configs": "configs"},
    ext_modules=compiled(),
)
