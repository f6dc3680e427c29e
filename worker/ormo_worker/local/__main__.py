"""`python -m ormo_worker.local` is `ormo-local`."""

import sys

from ormo_worker.local.cli import main

sys.exit(main())
