"""`python -m thinkfast` is the command line."""

import sys

from thinkfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
