"""`python -m ronna`."""

import sys

from ronna.cli import main

if __name__ == "__main__":
    sys.exit(main())
