"""Task files that others wrote: they run no code, and end."""

import time

import pytest
import yaml

import hlora
from hlora.cli import main as cli
from hlora.data.sandbox import Sandbox
from hlora.data.tasks import load_task
from hlora.run import harness
from hlora.run.taskfile import METRICS, TEMPLATES
from tests.tiny import questions, write_rows

pytestmark = pytest.mark.filterwarnings("default")

GOOD = {
    "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "t.jsonl"}},
    "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{prompt}}",
    "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
}  # fmt: skip

CODE = [
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "{{ lipsum.__globals__['os'].system('touch ran') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ prompt|attr('__class__') }}",
    "{{ self.__init__.__globals__.__builtins__.open('ran', 'w') }}",
    "{{ '{0.__class__}'.format(prompt) }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% include 'ran' %}",
]
ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{{ 'a' * 10**10 }}",
    "{{ 9**9**9 }}",
    "{{ 'a'|center(10**10) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%9999999999d'|format(1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{% set x = 'aaaaaaaa' %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}",
    "{% set x = 'aaaaaaaa' %}" + "{% set x = x + x %}" * 40 + "{{ x }}",
    "{% set x = 'aaaaaaaa' %}" + "{% set x = x|replace('a', x) %}" * 20 + "{{ x }}",
    "{% set x = 'aaaaaaaa' %}" + "{% set x = x.join([x, x, x]) %}" * 40 + "{{ x }}",
    "{% set x = 'aaaaaaaa' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40 + "{{ x }}",
    "{% set x = 'a' * 10**6 %}{{ [x, x] * 10**5 }}",
    "{% set x = ['a'] * 10**5 %}{{ x|join('a' * 10**5) }}",
    "{% set x = [1, 2] %}" + "{% set x = x + x %}" * 40 + "{{ x }}",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "t.jsonl", questions(4))
    return tmp_path


def run(tiny, task, capsys):
    with open("mine.yaml", "w") as file:
        yaml.safe_dump(task, file)
    began = time.monotonic()
    code = cli.main(["eval", "--model", str(tiny), "--lm-eval", "mine.yaml", "--dtype", "fp32"])
    assert time.monotonic() - began < 60
    return code, capsys.readouterr().err


@pytest.mark.parametrize("template", CODE)
@pytest.mark.parametrize("field", TEMPLATES[:3])
def test_no_template_runs_code(tiny, here, capsys, template, field):
    pytest.importorskip("lm_eval")
    code, said = run(tiny, {**GOOD, field: template}, capsys)
    assert code == 2
    assert "mine.yaml" in said or "lm-eval" in said
    assert not (here / "ran").exists()


@pytest.mark.parametrize("template", CODE + ENDLESS)
def test_no_template_of_a_task_format_runs_code_or_on(here, template):
    with open("f.yaml", "w") as file:
        yaml.safe_dump({"prompt": template, "choices": ["a", "b"], "answer": 0}, file)
    began = time.monotonic()
    with pytest.raises(hlora.InputError):
        load_task("t.jsonl", format="f.yaml")
    assert time.monotonic() - began < 10
    assert not (here / "ran").exists()


def test_a_template_that_does_not_end_is_stopped_in_lm_eval_too(tiny, here, capsys):
    pytest.importorskip("lm_eval")
    assert run(tiny, {**GOOD, "doc_to_text": ENDLESS[0]}, capsys)[0] == 2


def test_ordinary_templates_work():
    template = "{% for c in choices %}{{ loop.index }}. {{ c|trim }}{{ ', ' if not loop.last }}" \
               "{% endfor %}{% set n = 2 %} {{ (n * 3) ~ '!' }}{{ '\n' + q.strip() }}"  # fmt: skip
    found = Sandbox().rendered(template, {"choices": ["a ", "b"], "q": " why? "})
    assert found == "1. a, 2. b 6!\nwhy?"


def test_a_good_file_is_scored(tiny, here, capsys):
    pytest.importorskip("lm_eval")
    more = {
        "description": "A task.",
        "num_fewshot": 0,
        "doc_to_choice": ["odd", "even"],
        "tag": "x",
    }
    assert run(tiny, {**GOOD, **more}, capsys)[0] == 0


EVIL = "import os\nos.system('touch ran')\n"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"metric_list": [{"metric": "./evil"}]}, "./evil"),
        ({"metric_list": [{"metric": "evil/evil.py"}]}, "evil.py"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "hf_evaluate"),
        ({"metric_list": [{"metric": "acc", "aggregation": "evil"}]}, "evil"),
        ({"metric_list": [{"metric": ["acc"]}]}, "metric"),
        ({"metric_list": ["acc"]}, "metric_list"),
        ({"metric_list": {"metric": "acc"}}, "metric_list"),
        ({"process_docs": "evil.f"}, "process_docs"),
        ({"process_results": "{{ x }}"}, "process_results"),
        ({"use_prompt": "promptsource:x"}, "use_prompt"),
        ({"class": "evil.Task"}, "class"),
        ({"custom_dataset": "evil"}, "custom_dataset"),
        ({"unsafe_code": True}, "unsafe_code"),
        ({"filter_list": [{"name": "x"}]}, "filter_list"),
        ({"dataset_path": "./evil"}, "dataset_path"),
        ({"dataset_path": "evil/evil.py"}, "dataset_path"),
        ({"dataset_path": "pandas"}, "dataset_path"),
        ({"dataset_path": "webdataset"}, "dataset_path"),
        ({"dataset_path": ["json"]}, "dataset_path"),
        ({"dataset_kwargs": {"trust_remote_code": True}}, "trust_remote_code"),
        ({"dataset_kwargs": {"data_files": {"test": 3}}}, "data_files"),
        ({"dataset_kwargs": {"data_files": "https://example.org/x.json"}}, "x.json"),
        ({"dataset_kwargs": [1]}, "dataset_kwargs"),
        ({"dataset_kwargs": {}}, "data_files"),
        ({"generation_kwargs": {"custom_generate": "owner/name"}}, "custom_generate"),
        ({"generation_kwargs": {"trust_remote_code": True}}, "trust_remote_code"),
        ({"doc_to_text": {"a": 1}}, "doc_to_text"),
        ({"doc_to_text": "{{"}, "doc_to_text"),
        ({"doc_to_text": "{{ x | regex_replace('(a+)+$', '') }}"}, "doc_to_text"),
        ({"doc_to_choice": [["a"], "b"]}, "doc_to_choice"),
        ({"num_fewshot": "many"}, "num_fewshot"),
        ({"task": ["a"]}, "task"),
    ],
)
def test_what_could_run_code_or_is_of_a_wrong_type_is_refused(here, change, named):
    pytest.importorskip("lm_eval")
    (here / "evil").mkdir()
    (here / "evil" / "evil.py").write_text(EVIL)
    (here / "mine.yaml").write_text(yaml.safe_dump({**GOOD, **change}))
    with pytest.raises(hlora.InputError, match=named.replace(".", r"\.")) as error:
        harness.prepare(["mine.yaml"])
    assert "mine.yaml" in str(error.value)
    assert not (here / "ran").exists()


@pytest.mark.parametrize(
    "text", ["[" * 5000, "a: &a [*a]", "task: !!python/name:os.system\n", "\0"]
)
def test_a_file_that_is_no_yaml_is_one_error(here, text):
    pytest.importorskip("lm_eval")
    (here / "mine.yaml").write_text(text)
    with pytest.raises(hlora.InputError, match=r"mine\.yaml"):
        harness.prepare(["mine.yaml"])


def test_two_tasks_of_one_name_are_refused(here):
    pytest.importorskip("lm_eval")
    for name in ("a.yaml", "b.yaml"):
        (here / name).write_text(yaml.safe_dump(GOOD))
    with pytest.raises(hlora.InputError, match="'mine'"):
        harness.prepare(["a.yaml", "b.yaml"])


def test_every_allowed_metric_is_lm_eval_s_own():
    pytest.importorskip("lm_eval")
    import lm_eval.api.metrics  # noqa: F401
    from lm_eval.api import registry

    assert all(m in registry.METRIC_REGISTRY for m in METRICS)
