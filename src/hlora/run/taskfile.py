"""A task file of lm-evaluation-harness, checked.

Such a file may come from anywhere, and lm-eval would run code from it: by a tag, a metric, a class
or a data set. Here only known keys, metrics and readers pass, each with the right type, and the
file must be whole.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hlora.data.parse import read_yaml
from hlora.data.sandbox import Sandbox
from hlora.errors import InputError, refuse_unknown
from hlora.run.build import plain

TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice", "doc_to_decontamination_query")
_TEXT = (
    "task", "task_alias", "dataset_path", "dataset_name", "output_type", "training_split",
    "validation_split", "test_split", "fewshot_split", "description", "target_delimiter",
    "fewshot_delimiter", *TEMPLATES,
)  # fmt: skip
_PLAIN = {
    "num_fewshot": int, "repeats": int, "should_decontaminate": bool, "metric_list": list,
    "generation_kwargs": dict, "dataset_kwargs": dict,
}  # fmt: skip
_IGNORED = ("tag", "group", "metadata")
METRICS = (
    "acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "perplexity", "likelihood",
    "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "mcc", "f1", "bleu",
    "chrf", "ter",
)  # fmt: skip
"""Those that lm-eval holds itself. It would fetch another from the hub or a folder, and run it."""
_OF_A_METRIC = {
    "metric": str, "aggregation": str, "higher_is_better": bool, "ignore_case": bool,
    "ignore_punctuation": bool, "ignore_numbers": bool,
}  # fmt: skip
AGGREGATIONS = (
    "mean", "nanmean", "median", "perplexity", "weighted_perplexity", "bits_per_byte", "f1",
    "matthews_corrcoef", "bleu", "chrf", "ter", "brier_score",
)  # fmt: skip
_GENERATION = (
    "until", "do_sample", "temperature", "top_p", "top_k", "max_gen_toks", "max_new_tokens",
    "num_beams",
)  # fmt: skip
READERS = ("json", "csv", "parquet", "text")
"""Readers of `datasets` that a task file may name; some others unpickle."""


def read_task_file(path: Path) -> dict[str, Any]:
    """A task file of allowed keys only, their values of the right types.

    Raises:
        InputError: names what is not allowed, missing or wrong.
    """
    named = f"The task file {path}"
    try:
        values = read_yaml(path, "task file")
    except InputError as error:
        if "could not determine a constructor" not in str(error):
            raise
        raise InputError(
            f"{named} asks for Python code (a tag such as !function), which is not run: use "
            "templates only."
        ) from None
    if "include" in values:
        raise InputError(
            f"{named} includes {values['include']!r}: copy that into it, since a task file must be "
            "whole here."
        )
    known = (*_TEXT, *_PLAIN, *_IGNORED)
    refuse_unknown(values, known, f"{named} has a key that is not allowed:")
    missing = [k for k in ("task", "dataset_path", "output_type", "doc_to_text") if k not in values]
    if missing:
        raise InputError(f"{named} lacks {missing[0]!r}.")
    task = {
        k: _value(k, v, named) for k, v in values.items() if k not in _IGNORED and v is not None
    }
    for of in task.get("metric_list", []):
        _check_metric(of, named)
    refuse_unknown(
        task.get("generation_kwargs", {}), _GENERATION, f"{named}: generation_kwargs cannot set"
    )
    _check_data(task, path)
    return task


def _value(key: str, value: Any, named: str) -> Any:
    if key in _PLAIN:
        value = plain(value)
        if type(value) is not _PLAIN[key]:
            raise InputError(f"{named}: {key} cannot be {str(value)[:60]}.")
        return value
    if key == "doc_to_choice" and isinstance(value, list):
        if not all(isinstance(v, str) for v in value):
            raise InputError(f"{named}: {key} must be a template, or a list of texts.")
        return value
    if not isinstance(value, str):
        raise InputError(f"{named}: {key} must be text.")
    if key in TEMPLATES:
        try:
            Sandbox().from_string(value)
        except Exception as error:  # a template may fail to compile in any way
            raise InputError(f"{named}: {key} is no template that is allowed: {error}") from None
    return int(value) if key == "doc_to_target" and value.isdecimal() else value


def _check_metric(of: Any, named: str) -> None:
    if not isinstance(of, dict) or "metric" not in of:
        raise InputError(f"{named}: each entry of metric_list must have a metric.")
    refuse_unknown(of, _OF_A_METRIC, f"{named}: a metric cannot have")
    for key, value in of.items():
        if type(value) is not _OF_A_METRIC[key]:
            raise InputError(f"{named}: {key} cannot be {str(value)[:60]}.")
    refuse_unknown([of["metric"]], METRICS, f"{named}: the metric is not allowed:")
    if "aggregation" in of:
        refuse_unknown(
            [of["aggregation"]], AGGREGATIONS, f"{named}: the aggregation is not allowed:"
        )


def _check_data(task: dict[str, Any], path: Path) -> None:
    """Data from files beside the task file, or by a name on the hub."""
    where, given = task["dataset_path"], task.get("dataset_kwargs", {})
    refuse_unknown(given, ("data_files", "revision"), f"{path}: dataset_kwargs cannot set")
    if where not in READERS:
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", where) or Path(where).exists():
            raise InputError(
                f"{path}: dataset_path must be {', '.join(READERS)} with data_files, or owner/name "
                f"on the hub, not {where!r}."
            )
        if "data_files" in given:
            raise InputError(f"{path}: data_files go with the dataset_path json, csv or parquet.")
        return
    files = given.get("data_files")
    files = files if isinstance(files, dict) else {"train": files}
    for split, listed in files.items():
        listed = listed if isinstance(listed, list) else [listed]
        if not listed or not all(isinstance(f, str) for f in listed):
            raise InputError(f"{path}: data_files must name files.")
        here = [path.parent / f for f in listed]
        for file in here:
            if not file.is_file():
                raise InputError(f"{path} names {file.name}, and there is no file {file}.")
        files[split] = [str(file.resolve()) for file in here]
    given["data_files"] = files
