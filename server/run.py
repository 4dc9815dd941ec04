"""Same as `fedlora server up`; entry point of the container."""

import sys

from fedlora.cli import main

sys.exit(main(["server", "up", *sys.argv[1:]]))
