"""Task formats as data: which columns, how a row reads as a prompt, what the choices are.

Prompts and choices are those of lm-evaluation-harness, so that accuracies are comparable.
Templates are jinja2 over the row's columns.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """How rows of a task are read.

    Attributes:
        name: as given to --task-format.
        columns: a file whose rows have all of these is recognised as this task.
        prompt: template of the question.
        choices: a template for each choice, or the one name of a column that lists them.
        answer: the right choice: its index, or a template that gives an index or one of `labels`.
        labels: a column (or fixed names) that an answer's label is looked up in.
        hub: the data set on the hub, `owner/name[:config]`.
        test_split: the hub's split with public labels.
        delimiter: between the prompt and a choice.
    """

    name: str
    columns: tuple[str, ...]
    prompt: str
    choices: tuple[str, ...] | str
    answer: int | str
    labels: tuple[str, ...] | str = ()
    hub: str | None = None
    test_split: str = "test"
    delimiter: str = " "


_QUESTION = "Question: {{question}}\nAnswer:"

FORMATS = {
    f.name: f
    for f in (
        Format(
            name="sciq",
            columns=("question", "distractor1", "distractor2", "distractor3", "correct_answer"),
            prompt="{{(support | default('', true)).lstrip()}}\n" + _QUESTION,
            choices=("{{distractor1}}", "{{distractor2}}", "{{distractor3}}", "{{correct_answer}}"),
            answer=3,
            hub="allenai/sciq",
        ),
        Format(
            name="piqa",
            columns=("goal", "sol1", "sol2", "label"),
            prompt="Question: {{goal}}\nAnswer:",
            choices=("{{sol1}}", "{{sol2}}"),
            answer="{{label}}",
            hub="baber/piqa",
            test_split="validation",
        ),
        Format(
            name="medmcqa",
            columns=("question", "opa", "opb", "opc", "opd", "cop"),
            prompt="Question: {{question}}\nChoices:\nA. {{opa}}\nB. {{opb}}\nC. {{opc}}\n"
            "D. {{opd}}\nAnswer:",
            choices=("A", "B", "C", "D"),
            answer="{{cop}}",
            hub="openlifescienceai/medmcqa",
            test_split="validation",
        ),
        Format(
            name="openbookqa",
            columns=("question_stem", "choices", "answerKey"),
            prompt="{{question_stem}}",
            choices="choices.text",
            answer="{{answerKey.strip()}}",
            labels="choices.label",
            hub="allenai/openbookqa:main",
        ),
        Format(
            name="arc_easy",
            columns=("question", "choices", "answerKey"),
            prompt=_QUESTION,
            choices="choices.text",
            answer="{{answerKey}}",
            labels="choices.label",
            hub="allenai/ai2_arc:ARC-Easy",
        ),
        Format(
            name="arc_challenge",
            columns=("question", "choices", "answerKey"),
            prompt=_QUESTION,
            choices="choices.text",
            answer="{{answerKey}}",
            labels="choices.label",
            hub="allenai/ai2_arc:ARC-Challenge",
        ),
        Format(
            name="choices",
            columns=("prompt", "choices", "answer"),
            prompt="{{prompt}}",
            choices="choices",
            answer="{{answer}}",
        ),
        Format(
            name="completion",
            columns=("prompt", "completion"),
            prompt="{{prompt}}",
            choices=("{{completion}}",),
            answer=0,
            delimiter="",
        ),
    )
}
