"""Every setting of every command, once: its name, type, default, unit and reason.

The same dataclasses serve the command line (`--batch-size 20`), a YAML file (`batch_size: 20`,
given with --config) and Python (`RecordSettings(batch_size=20, ...)`). No heavy import here:
`--help` must answer at once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from hlora.core.kinds import KINDS

USUAL_METRICS = (
    "acc", "nll", "ppl_seen", "ppl_unseen", "forgetting_seen", "forgetting_unseen",
)  # fmt: skip
"""Of `hlora.study.metrics`: what tables show unless told otherwise."""


def setting(
    help: str,
    default: Any = None,
    *,
    required: bool = False,
    choices: Collection[str] = (),
    metavar: str = "",
    more: bool = False,
    least: float | None = None,
    positional: bool = False,
) -> Any:
    """A field with what the help screen says of it.

    Args:
        more: shown by --help-all only.
        least: the smallest value allowed.
        positional: given without its name.
    """
    metadata = {
        "help": help, "required": required, "choices": choices, "metavar": metavar, "more": more,
        "least": least, "positional": positional,
    }  # fmt: skip
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Settings:
    """Common to all commands that load a model."""

    model: str = setting(
        "a folder, a name on the hub, a .gguf file, or smollm2-135m (embedded)", required=True
    )
    device: str = setting(
        "auto, cpu, cuda or mps; CUDA_VISIBLE_DEVICES chooses among GPUs", "auto", more=True
    )
    dtype: str = setting(
        "float type of the base model; auto is bf16 on a GPU or a CPU that is fast at it", "auto",
        choices=("auto", "bf16", "fp16", "fp32"), more=True,
    )  # fmt: skip


@dataclass(kw_only=True)
class TrainSettings(Settings):
    """Common to both phases. The paper's values are the defaults (its section 5)."""

    output: str = setting("folder for the result", required=True, metavar="DIR")
    epochs: float = setting("passes over the data", 5.0, least=0.001)
    max_steps: int = setting("stop after so many optimizer steps; 0 means by --epochs", 0, least=0)
    batch_size: int = setting("rows per device and micro-batch", 20, least=1)
    gradient_accumulation: int = setting("micro-batches per optimizer step", 1, least=1)
    learning_rate: float = setting("peak learning rate", 8e-4, least=0)
    seed: int = setting("seed of initialization, order and dropout", 0, least=0)
    save_steps: int = setting("optimizer steps between checkpoints; 0 for none", 500, least=0)
    resume: bool = setting("go on from the last checkpoint in the output folder", False)
    overwrite: bool = setting("replace a result that the output folder holds", False)
    dry_run: bool = setting("check every input, say what would be trained, and stop", False)
    lora_rank: int = setting("r", 8, more=True, least=1)
    lora_alpha: float = setting("α; the adapter's scale is α/r", 32.0, more=True, least=0.001)
    lora_dropout: float = setting("dropout before A", 0.0, more=True, least=0)
    rslora: bool = setting("scale by α/√r instead", False, more=True)
    targets: list[str] = setting(
        "modules that get an adapter; all-linear for every linear layer",
        ["q_proj", "v_proj"], metavar="NAME", more=True,
    )  # fmt: skip
    logging_steps: int = setting("optimizer steps between log lines", 10, more=True, least=1)
    training: dict[str, Any] = setting(
        "any field of transformers' TrainingArguments", {}, metavar="VALUE", more=True
    )


@dataclass(kw_only=True)
class RecordSettings(TrainSettings):
    """Phase ν: learn general text and record what matters for it."""

    text: list[str] = setting(
        "general text: .txt, .jsonl or .parquet files, folders, hub names (owner/name[:config]"
        "[@split][#column]), python-docs, python-docstrings, python-code; NAME=WHERE names a kind",
        [], required=True, metavar="TEXT",
    )  # fmt: skip
    text_column: str | None = setting("column that holds the text; found if there is one", None)
    text_weights: list[float] = setting(
        "shares of the kinds of text, one number each; all of everything if not given", [],
        metavar="W",
    )  # fmt: skip
    block_size: int = setting("tokens per row", 512, least=2)
    text_blocks: int = setting(
        "at most so many rows; 0 for all (4000 of a hub data set)", 0, more=True, least=0
    )
    importance: str | None = setting(
        "an earlier importance folder: start from its adapter and add to it (Eq. 13)", None,
        metavar="DIR", more=True,
    )  # fmt: skip
    kind: str | None = setting(
        "what is remembered: factored, row and column sums (if not given); dense, a number for "
        "each element (the paper, its presets, --storage); fisher, EWC's, without training", None,
        choices=KINDS,
    )  # fmt: skip
    storage: str = setting(
        "what dense importance is written as; int8 holds logarithms", "fp32",
        choices=("fp32", "bf16", "int8"), more=True,
    )  # fmt: skip
    preset: str = setting(
        "paper: Eq. 11-13 to the letter; official: the authors' code", "default",
        choices=("default", "paper", "official"), more=True,
    )  # fmt: skip
    fisher_sequences: int = setting(
        "rows of text for the Fisher information; 0 for 200, or EWC-LoRA's 20,000 if original", 0,
        more=True, least=0,
    )  # fmt: skip
    fisher_labels: str | None = setting(
        "labels sampled from the model (as lean does), or the corpus' own (as original does)", None,
        choices=("model", "corpus"), more=True,
    )  # fmt: skip
    fisher_method: str = setting(
        "lean: target matrices, whole batches; original: as EWC-LoRA published it, for its cost",
        "lean", choices=("lean", "original"), more=True,
    )  # fmt: skip
    estimator: str | None = setting(
        "gradient of θ: equivalent (Eq. 11) or projected (Σω is the loss drop)", None,
        choices=("equivalent", "projected"), more=True,
    )  # fmt: skip
    xi: float | None = setting("ξ of Eq. 13; 0.001 unless the preset has its own", None, more=True)
    xi_relative: bool | None = setting("ξ is a multiple of the mean of Δ²", None, more=True)


@dataclass(kw_only=True)
class TuneSettings(TrainSettings):
    """Phase μ: learn the domain, held to what mattered."""

    importance: str | None = setting(
        "what `hlora record` wrote; without it the adapter is plain LoRA", None, metavar="DIR"
    )
    task: str = setting(
        "sciq, piqa, medmcqa, openbookqa, arc_easy, arc_challenge (hub), or a .jsonl or .parquet "
        "file with such rows or with prompt and completion",
        required=True,
    )  # fmt: skip
    phi: float | None = setting(
        "strength of the penalty; 0.01 unless the preset has its own, 0.003 to 0.03 is useful",
        None,
    )
    anchor: str | None = setting(
        "hold the weights to the recorded adapter and start there (nu, if not given), or to the "
        "base model", None, choices=("nu", "base"),
    )  # fmt: skip
    task_format: str | None = setting(
        "how rows are read, where their columns do not tell: a task's name, choices, completion, "
        "or a .yaml file",
        None, more=True,
    )  # fmt: skip
    task_rows: int = setting("at most so many rows; 0 for all", 0, more=True, least=0)
    max_length: int = setting(
        "tokens per row; a longer prompt loses its beginning", 512, more=True, least=8
    )
    preset: str = setting(
        "paper: Eq. 14-16 to the letter; official: the authors' code", "default",
        choices=("default", "paper", "official"), more=True,
    )  # fmt: skip
    layer_weights: str | None = setting(
        "weights of the layers: softmax (Eq. 15), normalized or uniform", None,
        choices=("softmax", "normalized", "uniform"), more=True,
    )  # fmt: skip
    normalize: bool | None = setting(
        "scale importance to a mean of one, so that phi carries over", None, more=True
    )


@dataclass(kw_only=True)
class EvalSettings(Settings):
    """Perplexity by kind of text, accuracy and NLL by task, and forgetting."""

    adapter: str | None = setting(
        "an adapter; the base model is then scored too, for the difference", None, metavar="DIR"
    )
    text: list[str] = setting("general text, as for `hlora record`", [], metavar="TEXT")
    task: list[str] = setting("tasks, as for `hlora tune`", [], metavar="TASK")
    lm_eval: list[str] = setting(
        "tasks for lm-evaluation-harness: its names (data from the hub) or .yaml task files", [],
        metavar="TASK",
    )  # fmt: skip
    json: str | None = setting("write all scores to this file", None, metavar="FILE")
    text_column: str | None = setting("column that holds the text", None)
    task_format: str | None = setting("how rows of the tasks are read", None)
    block_size: int = setting("tokens per row of text", 512, least=2)
    text_blocks: int = setting("at most so many rows of each kind; 0 for all", 200, least=0)
    task_rows: int = setting("at most so many questions of each task; 0 for all", 0, least=0)
    batch_size: int = setting("rows at once", 8, least=1)
    overwrite: bool = setting("replace the --json file", False)


@dataclass(kw_only=True)
class InspectSettings:
    """What is in an importance folder."""

    folder: str = setting(
        "what `hlora record` wrote", required=True, metavar="DIR", positional=True
    )
    plot: str | None = setting(
        "draw the layer heatmap (Fig. 7) to a .png or .svg", None, metavar="FILE"
    )


@dataclass(kw_only=True)
class ConvertSettings:
    """Write an importance folder in another form."""

    folder: str = setting(
        "what `hlora record` wrote", required=True, metavar="DIR", positional=True
    )
    to: str = setting(
        "fp32, bf16, int8 (logarithmic codes), factored (row and column sums), or ones (all "
        "elements alike: plain L2 to the recorded adapter)", required=True,
    )  # fmt: skip
    output: str = setting("folder for the result", required=True, metavar="DIR")
    overwrite: bool = setting("replace a result that the output folder holds", False)


@dataclass(kw_only=True)
class StudySettings:
    """Run a grid of methods, tasks, seeds and φ, one JSON line a run."""

    file: str = setting("a study (YAML)", required=True, metavar="FILE", positional=True)
    results: str | None = setting(
        "file of JSON lines; results/ and the study's name if not given", None, metavar="FILE"
    )
    jobs: int = setting("runs at once, on one GPU or the cores", 1, least=1)
    dry_run: bool = setting("check the study, list its runs, and stop", False)


@dataclass(kw_only=True)
class ReportSettings:
    """Tables and figures of a study, and what became of the paper's claims."""

    results: str = setting(
        "what `hlora study` wrote (.jsonl)", required=True, metavar="FILE", positional=True
    )
    output: str | None = setting(
        "folder for index.html and the figures; the results' name and -report if not given", None,
        metavar="DIR",
    )  # fmt: skip
    page: str | None = setting(
        "also write a Markdown page, its figures in a folder beside it", None, metavar="FILE.md"
    )
    metrics: list[str] = setting(
        "columns of the tables", list(USUAL_METRICS), metavar="NAME", more=True
    )
    compare: list[str] = setting(
        "two rows for Fig. 3, as METHOD or METHOD@PHI", ["hlora", "ewc"], metavar="ROW"
    )
    where: list[str] = setting(
        "only runs with this version or setting, such as versions.torch=2.13.0", [],
        metavar="KEY=VALUE",
    )  # fmt: skip
    mixed: bool = setting("average runs of different versions or settings, and say so", False)


@dataclass(kw_only=True)
class DemoSettings:
    """The whole story on a small model: under 10 minutes on two CPU cores."""

    output: str = setting("folder for the report and all results", "demo", metavar="DIR")
    phi: float = setting("strength of the penalty", 0.003, least=0)
    seed: int = setting("seed of everything", 0, least=0)
    overwrite: bool = setting(
        "start anew in a folder that holds a demo; one that was stopped goes on by itself", False
    )
    quick: bool = setting("a few steps only, to see that it runs", False)
    model: str = setting("the model; smollm2-135m is embedded", "smollm2-135m")
    device: str = setting("auto, cpu, cuda or mps", "auto")
    dtype: str = setting(
        "float type of the base model; auto is bf16 where that is fast", "auto",
        choices=("auto", "bf16", "fp16", "fp32"),
    )  # fmt: skip
