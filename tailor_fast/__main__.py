"""``python -m tailor_fast`` is ``tailor-fast``."""

import sys

from tailor_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
