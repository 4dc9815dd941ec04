"""Same as `fedlora site up`; entry point of the service."""

import sys

from fedlora.cli import main

sys.exit(main(["site", "up", *sys.argv[1:]]))
