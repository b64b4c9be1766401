"""Puts `configs/` inside the wheel as `neuralode/configs`, and builds the CPU kernels where there is a compiler.

Everything else is in pyproject.toml. Without a compiler, or where it fails, the package installs all the same and
solves run in plain PyTorch: `python -m neuralode.kernels` says what is built.
"""

import copy
import functools
import platform
import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("neuralode/kernels/csrc")
FLAGS = [
    "-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-w",
]  # fmt: skip
# neuralode/kernels/library.py reckons the same: a build that an older checkout left behind is not used
VERSION = functools.reduce(lambda crc, path: zlib.crc32(path.read_bytes(), crc), sorted(KERNELS.glob("*.[ch]*")), 0)
# one library for each set of instructions; which of them a processor can run is seen when the package is used
BUILDS = {
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "plain": [],
}
if platform.machine().lower() not in ("x86_64", "amd64"):
    BUILDS = {"plain": []}


class BuildKernels(build_ext):
    """Goes on without a kernel that does not build, and says so in one line; the builds run side by side."""

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or len(BUILDS)

    def build_extension(self, ext):
        own = copy.copy(self)  # its objects lie apart: the builds make them of the same sources, with other flags
        own.build_temp = str(Path(self.build_temp) / ext.name)
        try:
            build_ext.build_extension(own, ext)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"neuralode: {ext.name} is not built ({reason}); install a C++ compiler and install again for speed.")


setup(
    packages=[*find_packages(include=["neuralode", "neuralode.*"]), "neuralode.configs"],
    package_dir={"neuralode.configs": "configs"},
    package_data={
        "neuralode": ["py.typed"],
        "neuralode.data": ["*.csv"],
        "neuralode.configs": ["**/*.yaml"],
        "neuralode.kernels": ["csrc/*", "csrc/cuda/*"],
    },
    ext_modules=[
        Extension(
            f"neuralode.kernels._cpu_{name}", [str(source) for source in sorted(KERNELS.glob("*.cpp"))],
            depends=[str(header) for header in sorted(KERNELS.glob("*.h"))],
            define_macros=[("NEURALODE_VERSION", f"{VERSION}u")], extra_compile_args=[*FLAGS, *flags], optional=True,
        )
        for name, flags in BUILDS.items()
    ],
    cmdclass={"build_ext": BuildKernels},
)  # fmt: skip
