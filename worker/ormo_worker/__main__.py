"""`python -m ormo_worker` is `ormo-worker`."""

import sys

from ormo_worker.cli import main

sys.exit(main())
