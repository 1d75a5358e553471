"""A panel in TensorBoard, ready-made: what the domain gains and what general text loses."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class Panels(TrainerCallback):
    """Lays out custom scalars once a training, at the first log that has a regularizer's figures.

    By then every TensorBoard reporter has its writer, whenever it was added.
    """

    def __init__(self, trainer: Any) -> None:
        self._handler = trainer.callback_handler
        self._laid = False

    def on_train_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        self._laid = False

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if self._laid or "penalty" not in (logs or {}):
            return
        self._laid = True
        for callback in self._handler.callbacks:
            if writer := getattr(callback, "tb_writer", None):
                writer.add_custom_scalars(layout(logs))


def layout(logs: dict[str, Any]) -> dict[str, dict[str, list]]:
    """Charts of what is logged, in one category; a tag is a pattern there."""
    charts = {"domain loss and penalty": ("loss", "penalty")}
    if "forgetting" in logs:
        charts = {"domain loss and forgetting": ("loss", "forgetting"), **charts}
    tagged = {k: ["Multiline", [f"^train/{name}$" for name in of]] for k, of in charts.items()}
    return {"hlora": tagged}
