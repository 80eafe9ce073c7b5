"""``python -m sb3_mbdpo`` is the command ``mbdpo``."""

import sys

from sb3_mbdpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
