"""The command line. Heavy imports wait until a command runs."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import hlora
from hlora.errors import DivergedError, HloraError, HubError, InputError, suggest, visible
from hlora.run import settings as config

COMMANDS = {
    "record": (
        config.RecordSettings,
        "find out which weights matter for general text",
    ),
    "tune": (config.TuneSettings, "learn a domain without forgetting general text"),
    "eval": (config.EvalSettings, "measure perplexity, accuracy and forgetting"),
    "rewind": (config.RewindSettings, "scale an adapter back to a budget of forgetting"),
    "merge": (config.MergeSettings, "add an adapter to the weights of its base model"),
    "inspect": (config.InspectSettings, "show what an importance folder contains"),
    "convert": (config.ConvertSettings, "convert an importance folder to another form"),
    "study": (config.StudySettings, "run a grid of methods, tasks, seeds and φ"),
    "report": (
        config.ReportSettings,
        "tables and figures of a study, a check of the paper's claims",
    ),
    "demo": (config.DemoSettings, "record, tune and measure a small model"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns 0, 1 (failed), 2 (the user's mistake) or 130 (Ctrl-C)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except HloraError as error:
        return _complain(str(error), 1 if isinstance(error, (DivergedError, HubError)) else 2)
    except KeyboardInterrupt as stop:
        said = "Stopped. What was written whole is kept; with checkpoints, --resume goes on."
        return _complain(str(stop) or said, 130)
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return 0
    except Exception as error:
        from hlora.files import is_full_disk

        if is_full_disk(error):
            return _complain(
                f"The disk is full ({error}), or a limit on the size of files is reached. Make "
                "room and use --resume.",
                1,
            )
        if "out of memory" in str(error).lower():
            return _complain(
                "Out of memory on the device: lower --batch-size and raise "
                "--gradient-accumulation by the same factor.",
                1,
            )
        raise


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        print(f"hlora {hlora.__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        listed = f": there are {', '.join(COMMANDS)}."
        raise InputError(f"There is no command {name!r}" + suggest(name, COMMANDS, listed))
    if os.environ.get("RANK", "0") != "0":  # under torchrun one process speaks
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    from hlora.cli.options import parse
    from hlora.run.inputs import check
    from hlora.run.outputs import leaving
    from hlora.run.quiet import quiet_libraries

    settings: object = parse(COMMANDS[name][0], rest, f"hlora {name}")
    check(settings)
    command = import_module(f"hlora.cli.{name}")
    quiet_libraries()
    with leaving(settings):
        command.run(settings)
    if "RANK" in os.environ:
        from hlora.hf.distributed import leave_together

        leave_together()
    return 0


def _overview() -> str:
    lines = ["LoRA fine-tuning that does not forget.", "", "usage: hlora COMMAND [options]", ""]
    lines += [f"  {name:<9}{what}" for name, (_, what) in COMMANDS.items()]
    lines += ["", "Run hlora COMMAND --help for its settings."]
    return "\n".join(lines)


def _complain(message: str, code: int) -> int:
    print(f"hlora: {visible(message)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
