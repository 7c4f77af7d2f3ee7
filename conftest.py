"""How many processes the tests run in."""

import pytest


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Return 0, none but this process, where files or tests are named: a debugger then has the terminal.

    None leaves the whole suite to xdist, which starts a process for every core.
    """
    return None if config.args_source is pytest.Config.ArgsSource.TESTPATHS else 0
