"""Model × method × task × seed × φ, as one JSON line a run.

A study that was stopped goes on where it was; a run that fails is noted with its reason and the
others go on. Runs that need the same phase ν share it.
"""

from hlora.study.lines import read_results
from hlora.study.runner import run_study
from hlora.study.spec import Run, Study, key_of, read_study, runs_of

__all__ = ["Run", "Study", "key_of", "read_results", "read_study", "run_study", "runs_of"]
