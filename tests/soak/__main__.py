"""All of it, on two cores: `python -m tests.soak [--page docs/reliability.md]`.

Commands are killed before each of their file operations and at random times, and started again:
what they make must be that of a run that nobody killed, to the bit. Every file that is read is
damaged, signed again where a checksum would stop it: it must be refused in one sentence or be read.
Hostile files must not run code, write a secret or go on for ever. Disks are full. It fails on a
traceback, a silent difference, executed code, and on what a kill leaves lying about.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import contextlib
import json
import logging
import multiprocessing
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging as their_logging

from hlora.files import write_whole
from tests.soak.disk import full
from tests.soak.hostile import try_all
from tests.soak.kills import Kills, at_random, before_each, prepared
from tests.soak.mutations import mutate
from tests.soak.place import build
from tests.soak.readers import readers

PAGE = """# What was tried to break it

Made by `make soak`, {when}, in {minutes:.0f} minutes on {cores} processes. Commands on a tiny model
were killed before each of their file operations and at random times, and started again; every file
that is read was damaged, and signed again where a checksum would stop it; hostile files were read;
disks were full. The commands: `record`, `tune`, `tune --record` ("domain") and `study`.

"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="kill before each n-th operation")
    parser.add_argument("--kills", type=int, default=200, help="kills at random times")
    parser.add_argument("--mutations", type=int, default=5000, help="damaged files")
    parser.add_argument("--disks", type=int, default=50, help="full disks")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--page", type=Path, help="write the counts as a Markdown page")
    given = parser.parse_args(argv)
    page = given.page and given.page.resolve()
    began = time.monotonic()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    their_logging.disable_progress_bar()
    their_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        build(Path(name))
        kills = prepared()
        all_readers = readers()
        print(f"{sum(k.first.operations for k in kills)} file operations, "
              f"{len(all_readers)} ways to read a file.", flush=True)  # fmt: skip
        parts = [
            lambda part, n: before_each(kills, given.every, part, n),
            lambda part, n: at_random(kills, given.kills, part, n),
            lambda part, n: full(kills, given.disks, part, n),
            lambda part, n: mutate(all_readers, given.mutations, part, n),
            lambda part, n: try_all() if part == 0 else Counter(),
        ]
        found: Counter = Counter()
        for part in parts:
            found += shared(part, kills, given.jobs)
            print(
                f"{sum(found.values())} tried, {(time.monotonic() - began) / 60:.0f} min",
                flush=True,
            )
    lines = ["| | |", "|---|---:|", *(f"| {what} | {n} |" for what, n in found.items())]
    print("\n".join(lines))
    if page:
        head = PAGE.format(
            when=time.strftime("%Y-%m-%d"), minutes=(time.monotonic() - began) / 60,
            cores=given.jobs,
        )  # fmt: skip
        write_whole(page, head + "\n".join(lines) + "\n")
    if bad := {w: n for w, n in found.items() if re.search("[A-Z]{3}", w.rpartition(": ")[2])}:
        sys.exit(f"Not as it must be: {bad}")


def shared(part: Callable[[int, int], Counter], kills: list[Kills], jobs: int) -> Counter:
    """The sum of what processes find that each try a part, in folders of their own."""
    at = multiprocessing.get_context("fork")
    with contextlib.ExitStack() as stack:
        ends, workers = [], []
        for index in range(jobs):
            here, there = at.Pipe(duplex=False)
            worker = at.Process(target=_apart, args=(part, index, jobs, there))
            worker.start()
            stack.callback(worker.kill)
            there.close()
            ends.append(here)
            workers.append(worker)
        found = sum((Counter(json.loads(end.recv())) for end in ends), Counter())
        for worker in workers:
            worker.join()
        return found


def _apart(part: Callable[[int, int], Counter], index: int, jobs: int, end: object) -> None:
    import shutil

    here = Path.cwd()
    own = here.with_name(f"{here.name}-{index}")
    shutil.copytree(here, own)
    os.chdir(own)
    try:
        found = part(index, jobs)
    finally:
        os.chdir(here)
        shutil.rmtree(own, ignore_errors=True)
    end.send(json.dumps(found))  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
