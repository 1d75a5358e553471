"""Every setting of every command, defined once: name, type, default and help text.

The same dataclasses serve the command line (`--batch-size 20`), a YAML file (`batch_size: 20`,
passed with --config) and Python (`RecordSettings(batch_size=20, ...)`). No heavy imports here, so
that `--help` is fast.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from hlora.core.kinds import KINDS

DEFAULT_KIND = "blend"
"""The importance that `hlora record` makes unless told otherwise."""
OF_TRAINING = (
    "epochs", "max_steps", "learning_rate", "gradient_accumulation", "preset", "estimator", "xi",
    "xi_relative",
)  # fmt: skip
"""Settings of a general phase that importance gathered without training has no use for."""
OTHER_ADAPTERS = ("OFT", "OSF")
"""PEFT's adapters besides LoRA that a domain can be learned with, without importance."""
DOTTED = ("training", "peft")
"""Settings that are fields of another library's, `--training.NAME`."""
OF_EACH = ("importance", "phi", "anchor")
"""Settings of a domain phase that may be given for each of several importances."""
BLOCK, GATHERED_BLOCK = 512, 128
"""Tokens per row by default: of a recording, and of a gathering at the base."""
USUAL_METRICS = (
    "acc", "nll", "gain", "ppl_seen", "ppl_unseen", "forgetting_seen", "forgetting_unseen",
    "kl_seen", "kl_unseen", "kl_apart",
)  # fmt: skip
"""Columns of the tables by default, where they were measured; names in `hlora.study.metrics`."""


def setting(
    help: str,
    default: Any = None,
    *,
    required: bool = False,
    choices: Collection[str] = (),
    metavar: str = "",
    more: bool = False,
    least: float | None = None,
    most: float | None = None,
    positional: bool = False,
) -> Any:
    """A dataclass field with its help text.

    Args:
        more: shown by --help-all only.
        least, most: the smallest and the largest value allowed; a whole number has 32 bits.
        positional: passed without a flag.
    """
    metadata = {
        "help": help, "required": required, "choices": choices, "metavar": metavar, "more": more,
        "least": least, "most": most, "positional": positional,
    }  # fmt: skip
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def listed(value: Any) -> list[Any]:
    """Of a setting that may be one value, several or none."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


PUSH = "upload the finished folder to the hub; a new repository is private"
PUBLIC = "make the new repository of --push-to-hub public"

SECRETS = ("hub_token", "push_to_hub_token")
"""Fields of TrainingArguments that nobody else may read."""


def without_secrets(training: dict[str, Any]) -> dict[str, Any]:
    """The fields but for a hub token, which the hub's library then finds as HF_TOKEN.

    Settings are written beside results and checkpoints, and Trainer pickles its arguments.
    """
    for name in SECRETS:
        if training.get(name):
            os.environ["HF_TOKEN"] = str(training[name])
    return {k: v for k, v in training.items() if k not in SECRETS}


@dataclass(kw_only=True)
class Settings:
    """Settings of every command that loads a model."""

    model: str = setting(
        "a folder, a hub name, a .gguf file, or smollm2-135m (bundled)", required=True
    )
    device: str = setting(
        "auto, cpu, cuda or mps; select a GPU with CUDA_VISIBLE_DEVICES", "auto", more=True
    )
    dtype: str = setting(
        "dtype of the base model; auto is bf16 where the device is fast at it, else fp16 on CUDA, "
        "else fp32", "auto",
        choices=("auto", "bf16", "fp16", "fp32"), more=True,
    )  # fmt: skip
    load_in_4bit: bool = setting(
        "quantize the base model to 4 bits (NF4) as it is loaded, with bitsandbytes", False
    )
    load_in_8bit: bool = setting("the same with 8 bits", False, more=True)


@dataclass(kw_only=True)
class TrainSettings(Settings):
    """Settings of both training phases. The defaults are the paper's (section 5)."""

    output: str = setting("output folder", required=True, metavar="DIR")
    epochs: float = setting("passes over the data", 5.0, least=0.001, most=1e6)
    max_steps: int = setting("number of optimizer steps; 0 trains for --epochs", 0, least=0)
    batch_size: int = setting("rows per device in each micro-batch", 20, least=1)
    gradient_accumulation: int = setting("micro-batches per optimizer step", 1, least=1)
    learning_rate: float = setting("peak learning rate", 8e-4, least=0)
    seed: int = setting(
        "random seed for initialization, data order and dropout", 0, least=0, most=2**32 - 1
    )
    save_steps: int = setting("save a checkpoint every N optimizer steps; 0 for none", 500, least=0)
    resume: bool = setting(
        "resume from the last checkpoint in the output folder; a larger --max-steps or --epochs "
        "extends the run", False,
    )  # fmt: skip
    keep_checkpoint: bool = setting(
        "keep the last checkpoint of a finished run, so that --resume can extend it", False,
        more=True,
    )  # fmt: skip
    overwrite: bool = setting("replace an existing result in the output folder", False)
    push_to_hub: str | None = setting(PUSH, None, metavar="OWNER/NAME")
    public: bool = setting(PUBLIC, False, more=True)
    dry_run: bool = setting("check all inputs, show what would be trained, and stop", False)
    lora_rank: int = setting("rank r of the adapter", 8, more=True, least=1, most=65536)
    lora_alpha: float = setting(
        "α; the adapter is scaled by α/r", 32.0, more=True, least=0.001, most=1e6
    )
    lora_dropout: float = setting(
        "dropout on the adapter's input", 0.0, more=True, least=0, most=0.99
    )
    rslora: bool = setting("scale the adapter by α/√r (rsLoRA)", False, more=True)
    targets: list[str] = setting(
        "modules to adapt, also experts kept as one parameter; all-linear for every linear layer",
        ["q_proj", "v_proj"], metavar="NAME", more=True,
    )  # fmt: skip
    preset: str = setting(
        "paper: Eq. 11-13 and 14-16 to the letter; official: the authors' code", "default",
        choices=("default", "paper", "official"), more=True,
    )  # fmt: skip
    unheld: str = setting(
        "what is trained beside the matrices that importance covers, such as biases or "
        "embeddings: refuse, or warn and leave it free", "refuse",
        choices=("refuse", "warn"), more=True,
    )  # fmt: skip
    max_bad_steps: int = setting(
        "stop after N consecutive steps with a non-finite loss or gradient; each is skipped", 10,
        more=True, least=1,
    )  # fmt: skip
    logging_steps: int = setting("log every N optimizer steps", 10, more=True, least=1)
    training: dict[str, Any] = setting(
        "any field of transformers' TrainingArguments", {}, metavar="VALUE", more=True
    )

    def __post_init__(self) -> None:
        self.training = without_secrets(self.training)


@dataclass(kw_only=True)
class RecordSettings(TrainSettings):
    """Find out which weights matter for general text, at the base model or while training."""

    text: list[str] = setting(
        "general text: .txt, .jsonl, .csv or .parquet files, folders, hub names "
        "(owner/name[:config][@split][#column]), python-docs, python-docstrings, "
        "python-code; NAME=WHERE sets a name. May be left out for importance gathered at the "
        "base: the model then writes its own text", [],
        metavar="TEXT",
    )  # fmt: skip
    text_column: str | None = setting("column with the text; detected if there is only one", None)
    text_weights: list[float] = setting(
        "relative share of each kind of text; by default all text is used, or of each kind as much "
        "as --max-steps could need",
        [],
        metavar="W",
    )
    block_size: int = setting(
        f"tokens per row; 0 for {BLOCK}, or {GATHERED_BLOCK} for importance gathered at the base",
        0, least=0,
    )  # fmt: skip
    text_blocks: int = setting(
        "maximum number of rows; 0 for all (4000 from a hub data set)", 0, more=True, least=0
    )
    importance: str | None = setting(
        "an earlier importance, folder or hub name, to build on: starts from its adapter (Eq. 13)",
        None,
        metavar="DIR", more=True,
    )  # fmt: skip
    kind: str | None = setting(
        "form of the importance. Gathered at the base without training: blend (the default), the "
        "sum of kronecker and sketch; fisher, as in EWC; laplace, that of the entries of A and B. "
        "Recorded while training: dense, one value per weight (the paper; the default with its "
        "presets, --storage, --estimator or --xi); "
        "factored, row and column sums; entries, SI on A and B", None, choices=KINDS,
    )  # fmt: skip
    storage: str = setting(
        "file format of dense importance; int8 stores logarithms", "fp32",
        choices=("fp32", "bf16", "int8"), more=True,
    )  # fmt: skip
    sequences: int = setting(
        "rows of text for importance gathered without training; 0 for 128 (fisher: 200, and as in "
        "EWC-LoRA 20,000 with --fisher-method original)", 0, more=True, least=0,
    )  # fmt: skip
    keep_text: bool = setting(
        "keep the rows of --text in the importance, for looks beside those that the model wrote: "
        "whoever has the folder can read them", False, more=True,
    )  # fmt: skip
    fisher_labels: str | None = setting(
        "labels sampled from the model (default of lean) or taken from the text (original)", None,
        choices=("model", "corpus"), more=True,
    )  # fmt: skip
    fisher_method: str | None = setting(
        "lean (the default): target matrices only, batched; original: as EWC-LoRA published it "
        "(slow)", None, choices=("lean", "original"), more=True,
    )  # fmt: skip
    estimator: str | None = setting(
        "gradient of the full weights: equivalent (Eq. 11) or projected (sums to loss drop)", None,
        choices=("equivalent", "projected"), more=True,
    )  # fmt: skip
    xi: float | None = setting("ξ of Eq. 13; default 0.001 or the preset's", None, more=True)
    xi_relative: bool | None = setting(
        "take ξ as a multiple of the mean squared change of the weights", None, more=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        of_training = (self.storage, self.estimator, self.xi, self.xi_relative)
        if self.kind is None and self.preset == "default" and of_training == ("fp32", *[None] * 3):
            self.kind = DEFAULT_KIND


@dataclass(kw_only=True)
class TuneSettings(TrainSettings):
    """Learn a domain without forgetting what matters for general text."""

    importance: list[str] = setting(
        "folders written by `hlora record` or --record, or owner/name[@revision] on the hub, the "
        "oldest first; without any, plain LoRA from the base model", [],
        metavar="DIR",
    )  # fmt: skip
    record: str | None = setting(
        "also record the importance of this task's own weights into a folder, to hold later tasks "
        "to it; --kind and --preset say how, `hlora convert` changes its storage, and "
        "--push-to-hub uploads it with the adapter", None, metavar="DIR",
    )  # fmt: skip
    kind: str | None = setting(
        "form of the importance that --record writes: factored (the default), dense, entries",
        None, choices=KINDS, more=True,
    )  # fmt: skip
    peft: dict[str, Any] = setting(
        "another adapter than LoRA, without importance: peft_type OFT or OSF, and its settings in "
        "PEFT", {}, metavar="VALUE", more=True,
    )  # fmt: skip
    task: str = setting(
        "sciq, piqa, medmcqa, openbookqa, arc_easy, arc_challenge (from the hub), another data "
        "set there, or a .jsonl, .csv or .parquet file; its rows have the same columns, or prompt "
        "and completion, or messages (all answers in a conversation are learned)",
        required=True,
    )  # fmt: skip
    phi: list[float] = setting(
        "strength φ of the penalty, one for all importances or one for each; default 0.01, 1 with "
        "importance gathered at the base, or the preset's", [],
    )  # fmt: skip
    forget_at_most: float | None = setting(
        "in place of --phi, a budget of forgetting on general text: nats per token of KL "
        "divergence from the base model (importance of the kind blend; of several, the first)",
        None, metavar="NATS",
    )  # fmt: skip
    text: list[str] = setting(
        "general text that --forget-at-most measures on: a third of it while training, the rest "
        "after it, as for `hlora record` (default: python-docs@test)", [], metavar="TEXT",
        more=True,
    )  # fmt: skip
    look_every: int | None = setting(
        "once in N steps also look at the predictions, on text that the importance keeps, and "
        "correct what it pulls; 0 never looks (default, where the importance keeps such text: 16, "
        "and in a run of less than 64 steps a quarter of them)",
        None, more=True, least=0,
    )  # fmt: skip
    kl: list[str] = setting(
        "general text on which the predictions are held to the base model's while tuning (KL); "
        "own: text that the model writes itself; task: the prompts of the task's own rows", [],
        metavar="TEXT", more=True,
    )  # fmt: skip
    kl_weight: float = setting("weight of the KL (nats per token)", 1.0, more=True, least=0)
    corda: list[str] = setting(
        "general text: the adapter starts as the part of each matrix that it needs least (CorDA)",
        [], metavar="TEXT", more=True,
    )  # fmt: skip
    slow: float | None = setting(
        "hold --kl to a slow copy of the adapter in place of the base model, of which this much "
        "stays at each step; the copy is written (as in I-LoRA)", None,
        more=True, least=0.001, most=0.9999,
    )  # fmt: skip
    kl_every: int = setting("compute the KL once in N micro-batches", 4, more=True, least=1)
    replay: list[str] = setting(
        "general text to mix into the rows of the task; own: text that the model writes itself", [],
        metavar="TEXT", more=True,
    )  # fmt: skip
    replay_share: float = setting("fraction of rows from --replay", 0.2, more=True, least=0.001)
    anchor: list[str] = setting(
        "what the penalty pulls towards, one for all importances or one for each: nu, the recorded "
        "adapter, where training also starts; base, the base model; merged, the base model after "
        "adapters were merged into it; by default where the importance was gathered", [],
        choices=("nu", "base", "merged"), more=True,
    )  # fmt: skip
    task_format: str | None = setting(
        "how to read the rows, if their columns do not tell: a task's name, choices, completion, "
        "or a .yaml file", None, more=True,
    )  # fmt: skip
    task_rows: int = setting("maximum number of rows; 0 for all", 0, more=True, least=0)
    max_length: int = setting(
        "maximum tokens per row; longer prompts are cut at the start", 512, more=True, least=8
    )
    layer_weights: str | None = setting(
        "layer weights: softmax (Eq. 15), normalized or uniform", None,
        choices=("softmax", "normalized", "uniform"), more=True,
    )  # fmt: skip
    normalize: bool | None = setting(
        "scale importance to a mean of 1, so that --phi transfers between models", None, more=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in OF_EACH:  # in Python one of them needs no list
            setattr(self, name, listed(getattr(self, name)))


@dataclass(kw_only=True)
class EvalSettings(Settings):
    """Perplexity by kind of text, accuracy and NLL by task, and forgetting."""

    adapter: str | None = setting(
        "an adapter to compare with the base model: a folder or a hub name", None, metavar="DIR"
    )
    text: list[str] = setting("general text, as for `hlora record`", [], metavar="TEXT")
    task: list[str] = setting("tasks, as for `hlora tune`", [], metavar="TASK")
    lm_eval: list[str] = setting(
        "tasks of lm-evaluation-harness: names (data from the hub) or .yaml task files", [],
        metavar="TASK",
    )  # fmt: skip
    json: str | None = setting("write all scores to this file", None, metavar="FILE")
    text_column: str | None = setting("column with the text", None)
    task_format: str | None = setting("how to read the rows of the tasks", None)
    block_size: int = setting("tokens per row of text", 512, least=2)
    text_blocks: int = setting("maximum number of rows of each kind; 0 for all", 200, least=0)
    per_document: bool = setting(
        "take one row of each document, its beginning, so that rows are independent", False,
        more=True,
    )  # fmt: skip
    task_rows: int = setting("maximum number of questions per task; 0 for all", 0, least=0)
    batch_size: int = setting("rows per batch", 8, least=1)
    overwrite: bool = setting("replace the --json file", False)


@dataclass(kw_only=True)
class RewindSettings(Settings):
    """Scale a finished LoRA adapter back so that it forgets no more than a budget."""

    adapter: str = setting(
        "a LoRA adapter, trained by anyone: a folder or a hub name", required=True, metavar="DIR"
    )
    output: str = setting("output folder", required=True, metavar="DIR")
    forget_at_most: float = setting(
        "budget: nats per token of KL divergence from the base model on --text", 0.02,
        metavar="NATS", least=1e-6,
    )  # fmt: skip
    importance: str | None = setting(
        "importance gathered at the base (kind blend), folder or hub name: also try a scale "
        "for each matrix", None, metavar="DIR",
    )  # fmt: skip
    text: list[str] = setting(
        "general text to measure on, as for `hlora record`", ["python-docs@test"], metavar="TEXT"
    )
    task: str | None = setting("a task, as for `hlora tune`: what rewinding costs on it", None)
    task_format: str | None = setting("how to read the rows of the task", None, more=True)
    text_column: str | None = setting("column with the text", None, more=True)
    block_size: int = setting("tokens per row of text", 128, more=True, least=2)
    text_blocks: int = setting("number of rows of each kind", 24, more=True, least=1)
    task_rows: int = setting("number of rows of the task", 64, more=True, least=1)
    batch_size: int = setting("rows per batch", 8, more=True, least=1)
    overwrite: bool = setting("replace an existing result in the output folder", False)
    push_to_hub: str | None = setting(PUSH, None, metavar="OWNER/NAME")
    public: bool = setting(PUBLIC, False, more=True)


@dataclass(kw_only=True)
class MergeSettings:
    """Add a LoRA adapter to the weights of its base model: a model that needs no PEFT."""

    adapter: str = setting("a LoRA adapter: a folder or a hub name", required=True, metavar="DIR")
    output: str = setting("output folder", required=True, metavar="DIR")
    model: str | None = setting("the base model; by default the one that the adapter names", None)
    dtype: str = setting(
        "dtype of the merged weights; auto is that of the base model's files", "auto",
        choices=("auto", "bf16", "fp16", "fp32"),
    )  # fmt: skip


@dataclass(kw_only=True)
class InspectSettings:
    """Show what an importance folder contains."""

    folder: str = setting(
        "folder written by `hlora record`", required=True, metavar="DIR", positional=True
    )
    plot: str | None = setting(
        "save the layer heatmap (Fig. 7) as .png, .svg or .pdf", None, metavar="FILE"
    )


@dataclass(kw_only=True)
class ConvertSettings:
    """Convert an importance folder to another form."""

    folder: str = setting(
        "folder written by `hlora record`", required=True, metavar="DIR", positional=True
    )
    to: str = setting(
        "fp32, bf16, int8 (logarithmic codes), factored (row and column sums), or ones (every "
        "weight alike: plain L2 to the recorded adapter)", required=True,
    )  # fmt: skip
    output: str = setting("output folder", required=True, metavar="DIR")
    overwrite: bool = setting("replace an existing result in the output folder", False)


@dataclass(kw_only=True)
class StudySettings:
    """Run a grid of methods, tasks, seeds and φ; each run adds a line of JSON."""

    file: str = setting("study file (YAML)", required=True, metavar="FILE", positional=True)
    results: str | None = setting(
        "JSON lines file; default results/NAME.jsonl", None, metavar="FILE"
    )
    jobs: int = setting("number of parallel runs", 1, least=1)
    dry_run: bool = setting("check the study, list its runs, and stop", False)


@dataclass(kw_only=True)
class ReportSettings:
    """Tables and figures of a study, and a check of the paper's claims."""

    results: str = setting(
        "results file written by `hlora study` (.jsonl)", required=True, metavar="FILE",
        positional=True,
    )  # fmt: skip
    output: str | None = setting(
        "folder for index.html and figures; default RESULTS-report", None, metavar="DIR"
    )
    page: str | None = setting(
        "also write a Markdown page, with its figures in a folder next to it", None,
        metavar="FILE.md",
    )  # fmt: skip
    metrics: list[str] = setting(
        "columns of the tables", list(USUAL_METRICS), metavar="NAME", more=True
    )
    compare: list[str] = setting(
        "two rows for Fig. 3, as METHOD or METHOD@PHI", ["hlora", "ewc"], metavar="ROW"
    )
    where: list[str] = setting(
        "use only runs with this version, setting, method, task or seed, e.g. run.seed=0 or "
        "versions.torch=2.13.0", [],
        metavar="KEY=VALUE",
    )  # fmt: skip
    mixed: bool = setting("average over runs of different versions or settings", False)
    apart: list[str] = setting(
        "kinds of text that count as neither seen nor unseen, such as those that the model's own "
        "text is like", [],
        metavar="KIND", more=True,
    )  # fmt: skip


@dataclass(kw_only=True)
class DemoSettings:
    """Train, hold and measure a small model: about 10 minutes on two CPU cores."""

    output: str = setting("folder for the report and all results", "demo", metavar="DIR")
    phi: float = setting("strength of the penalty", 1.0, least=0)
    seed: int = setting("random seed", 0, least=0, most=2**32 - 1)
    overwrite: bool = setting("start over; by default an interrupted demo is resumed", False)
    quick: bool = setting("run only a few steps, as a smoke test", False)
    model: str = setting("model; smollm2-135m is bundled", "smollm2-135m")
    device: str = setting("auto, cpu, cuda or mps", "auto")
    dtype: str = setting(
        "dtype of the base model; auto is bf16 where the device is fast at it", "auto",
        choices=("auto", "bf16", "fp16", "fp32"),
    )  # fmt: skip
