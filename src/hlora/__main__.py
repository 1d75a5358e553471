"""`python -m hlora` is `hlora`."""

import sys

from hlora.cli import main

sys.exit(main())
