"""The README's lines under one trainer, as a user would paste them: does R arrive everywhere?

python trainers.py KIND SNIPPET.py    in a folder with BASE, a model, and base, its importance

Knows nothing of the checkout: it runs in an environment that has the wheel alone.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import sys
import time
from pathlib import Path

os.environ |= {
    "WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(Path("trackio").resolve()),
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

NUMBERS = range(16)
TEXT = [{"text": f"the number {i} is {i}"} for i in NUMBERS]
PROMPTED = [{"prompt": f"{i} is", "completion": " even"} for i in NUMBERS]
MESSAGES = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "even"}]}
    for i in NUMBERS
]
PREFERRED = [{"prompt": f"{i} is", "chosen": " even", "rejected": " odd"} for i in NUMBERS]
JUDGED = [{"prompt": f"{i} is", "completion": " even", "label": i % 2 == 0} for i in NUMBERS]

KINDS = {
    "Trainer": (TEXT, {}),
    "SFT text": (TEXT, {"max_length": 48}),
    "SFT messages": (MESSAGES, {"max_length": 48}),
    "SFT prompt and completion": (PROMPTED, {"max_length": 48}),
    "SFT packing": (TEXT, {"max_length": 48, "packing": True}),
    "SFT assistant-only loss": (MESSAGES, {"max_length": 48, "assistant_only_loss": True}),
    "DPO": (PREFERRED, {"max_length": 48}),
    "KTO": (JUDGED, {"max_length": 48}),
    "GRPO": (PREFERRED, {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}),
    "RLOO": (PREFERRED, {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}),
}
NAMES = ("R", "penalty", "total_loss", "penalty_grad_ratio")
REPORTERS = [
    name
    for name, module in {
        "tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"
    }.items()
    if importlib.util.find_spec(module)
]  # fmt: skip


def of_trl(name):
    import trl

    if hasattr(trl, name):
        return getattr(trl, name)
    module = name.removesuffix("Trainer").removesuffix("Config").lower()
    return getattr(importlib.import_module(f"trl.experimental.{module}"), name)


def arguments(kind):
    of = TrainingArguments if kind == "Trainer" else of_trl(f"{kind.split()[0]}Config")
    return of(
        output_dir="run", max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
        report_to=REPORTERS, run_name=kind, **KINDS[kind][1],
    )  # fmt: skip


def adapted():
    model = AutoModelForCausalLM.from_pretrained("BASE")
    config = LoraConfig(
        r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def trainer_of(kind):
    """What the README's `Trainer` stands for."""
    words = AutoTokenizer.from_pretrained("BASE")

    def make(model, args, train_dataset):
        if kind == "Trainer":
            rows = train_dataset.map(lambda r: words(r["text"]), remove_columns=["text"])
            collate = DataCollatorForLanguageModeling(words, mlm=False)
            return Trainer(model=model, args=args, train_dataset=rows, data_collator=collate)
        more = {"reward_funcs": reward} if kind in ("GRPO", "RLOO") else {}
        of = of_trl(f"{kind.split()[0]}Trainer")
        return of(
            model=model, args=args, train_dataset=train_dataset, processing_class=words, **more
        )

    return make


def reward(completions, **kwargs):
    return [float(len(c)) for c in completions]


def arrived(trainer, printed):
    """Where each of the names was found."""
    logged = [e for e in trainer.state.log_history if "loss" in e]
    found = {
        "log_history": bool(logged) and all(n in e for e in logged for n in NAMES),
        "console": all(f"'{n}'" in printed for n in NAMES),
    }
    keys = {f"train/{n}" for n in NAMES}
    if "tensorboard" in REPORTERS:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        files = [str(p) for p in Path().rglob("events.out.*")]
        tags: set[str] = set()
        for file in files:
            tags |= set(EventAccumulator(file).Reload().Tags()["scalars"])
        found["tensorboard"] = keys <= tags
    if "wandb" in REPORTERS:
        importlib.import_module("wandb").finish()
        for _ in range(60):  # a process of its own writes them
            content = b"".join(p.read_bytes() for p in Path().rglob("run-*.wandb"))
            found["wandb"] = all(n.encode() in content for n in keys)
            if found["wandb"]:
                break
            time.sleep(0.5)
    if "trackio" in REPORTERS:
        content = b"".join(p.read_bytes() for p in Path("trackio").rglob("*.db*"))
        found["trackio"] = all(n.encode() in content for n in keys)
    return {**found, "R": logged[-1].get("R") if logged else None}


def main(kind, snippet):
    rows = Dataset.from_list(KINDS[kind][0])
    names = {
        "Trainer": trainer_of(kind), "args": arguments(kind), "peft_model": adapted(),
        "new_peft_model": adapted(), "domain": rows, "general_text": rows,
    }  # fmt: skip
    printed = io.StringIO()
    code = Path(snippet).read_text("utf-8")
    with contextlib.redirect_stdout(printed):
        exec(compile("import hlora\n" + code, snippet, "exec"), names)
    print(json.dumps(arrived(names["trainer"], printed.getvalue())))


if __name__ == "__main__":
    main(*sys.argv[1:])
