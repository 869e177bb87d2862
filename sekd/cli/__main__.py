"""``python -m sekd.cli`` and ``accelerate launch -m sekd.cli``."""

import sys

from sekd.cli import main

if __name__ == "__main__":  # worker processes import this file again
    sys.exit(main())
