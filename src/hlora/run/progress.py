"""What a person sees while a command runs; quiet where no person looks."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from hlora.errors import visible
from hlora.hf.distributed import is_main
from hlora.run.signals import hearing


def watched() -> bool:
    """Whether a person looks at the progress."""
    return sys.stderr.isatty() and is_main()


def bar(what: str, total: int | None, unit: str = "rows", start: int = 0) -> Any:
    """A progress bar with the time left, or nothing where no person looks."""
    return tqdm(
        total=total, initial=start, desc=visible(what), unit=f" {unit}", disable=not watched(),
        leave=unit == "steps", dynamic_ncols=True,
    )  # fmt: skip


class Progress(TrainerCallback):
    """A bar over the optimizer steps with the loss, R and the time left."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.bar: Any = None

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.bar = bar(self.what, state.max_steps, "steps", state.global_step)

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        shown = {
            k: f"{logs[k]:.4g}" for k in ("loss", "R", "penalty", "forgetting") if k in (logs or {})
        }
        if shown and self.bar is not None:
            self.bar.set_postfix(shown)

    def on_train_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self.bar.close()


class Asked:
    """Ctrl-C or SIGTERM is noted while `listening`; another stops at once.

    Ctrl-C that a worker leaves to its parent it still ignores.

    Args:
        patient: another is only noted too.
    """

    def __init__(self, patient: bool = False) -> None:
        self.asked, self.patient = False, patient

    def _ask(self, signum: int, frame: Any) -> None:
        if self.asked and not self.patient:
            raise KeyboardInterrupt
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        is_worker = multiprocessing.parent_process() is not None
        with hearing(self._ask, if_ignored=not is_worker):
            yield


@contextmanager
def unbroken(said: str = "") -> Iterator[None]:
    """What is written inside is written whole: Ctrl-C or SIGTERM stops after it.

    Args:
        said: to be told then.
    """
    stop = Asked(patient=True)
    with stop.listening():
        yield
    if stop.asked:
        raise KeyboardInterrupt(said)


class Interruptible(Asked, TrainerCallback):
    """Ctrl-C or SIGTERM finishes the step, writes a checkpoint and stops; another stops at once.

    It must be the last callback, so that the others have written their state.

    Args:
        advice: how to go on.
        at_end: write one at the last step, whoever asks: more than a moment's work follows, before
            which Ctrl-C stops.
    """

    def __init__(self, advice: str, at_end: bool = False) -> None:
        super().__init__()
        self.advice, self.at_end = advice, at_end

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        at_end = self.at_end and state.global_step >= state.max_steps
        control.should_save |= self.asked or at_end
        return control

    def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self.asked:
            raise KeyboardInterrupt(
                f"Stopped at step {state.global_step} of {state.max_steps}. {self.advice}"
            )
