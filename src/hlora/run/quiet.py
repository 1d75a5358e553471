"""What a command does to the libraries' chatter. A library must not: only `hlora.cli` calls it."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from hlora.errors import visible


class _Visible(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def quiet_libraries() -> None:
    """Leave only errors of the libraries, and warnings of our own, on stderr."""
    # By environment too: transformers may be imported later, or in a process started from here.
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if "transformers" in sys.modules:
        from transformers.utils import logging as chatter

        chatter.set_verbosity_error()
        chatter.disable_progress_bar()
    for name in ("huggingface_hub", "lm_eval", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible("hlora: %(levelname)s: %(message)s"))
    first = os.environ.get("RANK", "0") == "0"
    handler.setLevel(logging.WARNING if first else logging.CRITICAL)
    logger = logging.getLogger("hlora")
    logger.handlers = [handler]
    logger.propagate = False
