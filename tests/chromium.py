"""How tests start headless Chromium, which asks nobody for anything of its own accord."""

import shutil

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def launch_options():
    """Arguments of Playwright's ``launch``."""
    path = shutil.which("chromium")
    assert path is not None, "these tests need chromium (Debian: apt install chromium)"
    return {"executable_path": path, "args": FLAGS}
