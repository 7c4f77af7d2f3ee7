"""``python -m mulsched``."""

import sys

from mulsched.cli import main

if __name__ == "__main__":
    sys.exit(main())
