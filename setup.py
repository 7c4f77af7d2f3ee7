"""Builds the native core; everything else about the package is in pyproject.toml."""

import os
import shutil
import sys
from hashlib import sha256
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# The order is part of the digest; tests/test_build.py computes it again from the checkout.
MODULES = ("mulsched._native", "mulsched.replay._native")
SOURCES = sorted([*ROOT.glob("csrc/*.hpp"), *(ROOT / f"{name.replace('.', '/')}.pyx" for name in MODULES)])


def source_digest() -> str:
    digest = sha256()
    for path in SOURCES:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class BuildExtension(build_ext):
    """build_ext that says in one line what is missing when there is no C++ compiler."""

    def build_extensions(self) -> None:
        command = getattr(self.compiler, "compiler_cxx", None) or ["c++"]
        if self.compiler.compiler_type == "unix" and shutil.which(command[0]) is None:
            sys.exit(
                f"mulsched: no C++ compiler ({command[0]!r} not found): install one (Debian: apt install g++)"
                ", or set MULSCHED_NO_EXTENSION=1 to build the pure-Python package."
            )
        super().build_extensions()


def extensions() -> list[Extension]:
    if os.environ.get("MULSCHED_NO_EXTENSION") == "1":
        return []
    from Cython.Build import cythonize

    debug = os.environ.get("MULSCHED_DEBUG") == "1"
    # -ffp-contract=off: a fused multiply-add would round once where numpy rounds twice, and the native
    # scores must equal the composed ones bit for bit.
    flags = ["-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
    modules = [
        Extension(
            name,
            sources=[f"{name.replace('.', '/')}.pyx"],
            depends=[str(path.relative_to(ROOT)) for path in SOURCES],
            include_dirs=["csrc"],
            language="c++",
            define_macros=[("MULSCHED_SOURCE_DIGEST", f'"{source_digest()}"')],
            extra_compile_args=[*flags, *(["-O1", "-g"] if debug else ["-O3", "-g0"])],
        )
        for name in MODULES
    ]
    directives = {
        "language_level": 3,
        "boundscheck": debug,
        "wraparound": False,
        "initializedcheck": debug,
        "cdivision": True,
        "embedsignature": False,
    }
    return cythonize(modules, compiler_directives=directives, build_dir="build/cython")


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
