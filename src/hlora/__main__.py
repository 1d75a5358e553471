"""`python -m hlora` is `hlora`."""

import sys

from hlora.cli.main import main

sys.exit(main())
