"""The command line. Heavy imports wait until a command runs."""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import hlora
from hlora.errors import DivergedError, HloraError, HubError, InputError, suggest, visible
from hlora.run import settings as config
from hlora.run.signals import hearing

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
    """Run a command. Returns 0, 1 (failed), 2 (the user's mistake) or 130 (Ctrl-C, SIGTERM)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    heard: list[int] = []

    def hear(signum: int, frame: Any) -> None:
        heard.append(signum)
        raise KeyboardInterrupt

    try:
        with hearing(hear):  # training hears by itself
            return _run(argv)
    except HloraError as error:
        return _complain(str(error), 1 if isinstance(error, (DivergedError, HubError)) else 2)
    except KeyboardInterrupt as stop:
        return _complain(str(stop) or "Stopped.", 130)
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return 0
    except Exception as error:
        if heard:  # a library that was being imported made it an error of its own
            return _complain("Stopped.", 130)
        from hlora.errors import is_memory
        from hlora.files import is_full_disk

        if is_full_disk(error):
            again = "use --resume" if "resume" in _settings_of(argv) else "start it again"
            return _complain(
                f"The disk is full ({error}), or a limit on the size of files is reached. Make "
                f"room and {again}.",
                1,
            )
        if is_memory(error):
            return _complain(f"Out of memory on the device: {_smaller(argv)}.", 1)
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
    with leaving(settings):
        try:
            quiet_libraries()  # some speak while they are imported
            command = import_module(f"hlora.cli.{name}")
            quiet_libraries()  # and transformers is told when it is there
            command.run(settings)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(_kept(name, settings, str(stop))) from None
    if "RANK" in os.environ:
        from hlora.hf.distributed import leave_together

        leave_together()
    return 0


def _settings_of(argv: list[str]) -> set[str]:
    known = COMMANDS.get(argv[0] if argv else "")
    return {f.name for f in fields(known[0])} if known else set()


def _smaller(argv: list[str]) -> str:
    """What takes less memory, among the settings that a command has."""
    known = _settings_of(argv)
    if "gradient_accumulation" in known:
        return "lower --batch-size and raise --gradient-accumulation by the same factor"
    if "batch_size" in known:
        return "lower --batch-size"
    return "lower batch_size in the study file" if argv[0] == "study" else "take a larger one"


def _kept(name: str, settings: Any, said: str) -> str:
    """What a command that was stopped says. Runs of theirs say what they kept themselves."""
    from hlora.files import MARKERS
    from hlora.run.outputs import NOTHING

    output = Path(getattr(settings, "output", None) or ".")
    begun = not (name == "demo" and (output / "report.html").exists())
    if name in ("study", "demo") and begun:
        without = " without --overwrite" if getattr(settings, "overwrite", False) else ""
        return f"Stopped. Finished runs are kept: the same command{without} goes on."
    if said:
        return said
    if name == "report":
        return "Stopped. The report may lack a part: the same command writes it again."
    if not hasattr(settings, "resume"):
        return f"Stopped. {NOTHING}"
    resumed = settings.resume
    if any(output.glob("checkpoints/checkpoint-*")) and (resumed or not settings.overwrite):
        goes_on = "the same command goes on" if resumed else "--resume goes on"
        return f"Stopped. The checkpoints in {output} are kept: {goes_on}."
    if resumed and any((output / marker).exists() for marker in MARKERS):
        return f"Stopped. The result in {output} is as it was."
    return f"Stopped. {NOTHING}"


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
