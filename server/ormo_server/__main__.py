"""`python -m ormo_server` is `ormo-server`."""

import sys

from ormo_server.cli import main

sys.exit(main())
