"""What can go wrong, each as one sentence that says what to do about it."""


class HloraError(Exception):
    """Base of every error that hlora raises on purpose. Its text is meant for the user."""


class InputError(HloraError):
    """A setting, file or folder that the user gave cannot be used."""


class UnsupportedModelError(HloraError):
    """The model or its adapter has a feature that the method cannot account for."""


class MismatchError(HloraError):
    """An importance folder belongs to another model, or to other LoRA settings."""


class StoreError(HloraError):
    """A file of an importance folder is missing, damaged or changed."""
