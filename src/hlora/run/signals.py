"""Who hears Ctrl-C and SIGTERM, a scheduler's Ctrl-C, for a while."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def hearing(handler: Callable[[int, Any], None], *, if_ignored: bool = False) -> Iterator[None]:
    """`handler` hears them inside; in a thread, which may not listen, nothing changes.

    Args:
        if_ignored: also those that the process ignores.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [s for s in STOPS if if_ignored or signal.getsignal(s) is not signal.SIG_IGN]
    before = {s: signal.signal(s, handler) for s in heard}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
