"""Which twin is used: forced, absent, broken. Each in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from backends import BACKENDS

import mulsched

PACKAGE = Path(mulsched.__file__).parent
PRINT = "import mulsched; print(mulsched.BACKEND)"
# an editable install would find the extension of the checkout for a copy that has none
NO_EDITABLE = (
    "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
)


def python(code, *, path=None, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("MULSCHED_")} | environment
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", NO_EDITABLE + code if path else code],
        env=env,
        cwd="/",
        capture_output=True,
        text=True,
    )


def copy_of_the_package(folder):
    """The package without its extension."""
    shutil.copytree(
        PACKAGE, folder / "mulsched", ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.pyx")
    )
    return folder


def test_the_suite_runs_on_the_backend_that_was_asked_for():
    asked = os.environ.get("MULSCHED_BACKEND", "auto")
    # unless told otherwise, a suite that silently ran in pure Python would prove nothing about the core
    assert ("python" if asked == "python" else "native") == mulsched.BACKEND


def test_python_is_used_when_asked_for():
    assert python(PRINT, MULSCHED_BACKEND="python").stdout == "python\n"


if "native" in BACKENDS:

    @pytest.mark.parametrize("backend", ["auto", "native"])
    def test_the_native_core_is_used_when_asked_for_and_by_default(backend):
        assert python(PRINT, MULSCHED_BACKEND=backend).stdout == "native\n"


def test_an_unknown_backend_is_an_error():
    done = python(PRINT, MULSCHED_BACKEND="fast")
    assert done.returncode != 0
    assert "MULSCHED_BACKEND must be auto, native or python, got 'fast'" in done.stderr


def test_without_the_extension_auto_warns_and_falls_back(tmp_path):
    done = python(PRINT, path=copy_of_the_package(tmp_path))
    assert done.stdout == "python\n"
    assert "BackendWarning: mulsched's native core is not installed" in done.stderr


def test_without_the_extension_native_is_an_error(tmp_path):
    done = python(PRINT, path=copy_of_the_package(tmp_path), MULSCHED_BACKEND="native")
    assert done.returncode != 0
    assert "ModuleNotFoundError: No module named 'mulsched._native'" in done.stderr


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_a_broken_extension_is_an_error_and_no_fallback(tmp_path, backend):
    folder = copy_of_the_package(tmp_path)
    (folder / "mulsched" / "_native.so").write_bytes(b"not a library")
    done = python(PRINT, path=folder, MULSCHED_BACKEND=backend)
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "ModuleNotFoundError" not in done.stderr
