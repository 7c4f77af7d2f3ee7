"""The build, as far as a checkout is there to build from: an installed package is tested elsewhere."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import mulsched

ROOT = Path(__file__).parent.parent

if (ROOT / "setup.py").exists():

    def setup(tmp_path, *arguments, **environment):
        """Run setup.py in a copy of the checkout."""
        for name in ("csrc", "mulsched"):
            shutil.copytree(
                ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
            )
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, tmp_path / name)
        translated = Path("build", "cython")  # the .pyx files, by the build: not once more
        if (ROOT / translated).exists():
            shutil.copytree(ROOT / translated, tmp_path / translated)
        env = {k: v for k, v in os.environ.items() if not k.startswith("MULSCHED_")} | environment
        return subprocess.run(
            [sys.executable, "setup.py", "-q", *arguments],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )

    def test_the_extension_is_not_older_than_its_sources():
        if mulsched.BACKEND == "python":
            return  # asked for: test_backend sees to it
        from mulsched._native import SOURCE_DIGEST
        from mulsched.replay._native import SOURCE_DIGEST as REPLAY_DIGEST

        source = (ROOT / "setup.py").read_text().rsplit("\nsetup(", 1)[0]
        names = {"__file__": str(ROOT / "setup.py")}
        exec(compile(source, "setup.py", "exec"), names)
        assert {names["source_digest"]()} == {SOURCE_DIGEST, REPLAY_DIGEST}, (
            "the native extension is stale, run: python setup.py build_ext --inplace"
        )

    def test_every_package_is_packed():
        declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
        there = [path.parent.relative_to(ROOT) for path in (ROOT / "mulsched").rglob("__init__.py")]
        assert sorted(".".join(path.parts) for path in there) == declared

    def test_without_a_compiler_the_build_fails_in_one_clear_line(tmp_path):
        done = setup(tmp_path, "build_ext", "--inplace", CXX="/nowhere/c++", CC="/nowhere/cc")
        assert done.returncode != 0
        said = [line for line in done.stderr.splitlines() if "mulsched:" in line]
        assert len(said) == 1
        assert "no C++ compiler ('/nowhere/c++' not found)" in said[0]
        assert "MULSCHED_NO_EXTENSION=1" in said[0]
        assert "Traceback" not in done.stderr

    def test_without_the_extension_there_is_nothing_to_compile(tmp_path):
        done = setup(tmp_path, "build_ext", "--inplace", CXX="/nowhere/c++", MULSCHED_NO_EXTENSION="1")
        assert done.returncode == 0, done.stderr
        assert not list(tmp_path.rglob("*.so"))
