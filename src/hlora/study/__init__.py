"""Model × method × task × seed × φ, as one JSON line a run, and what the lines say.

A study that was stopped goes on where it was; a run that fails is noted with its reason and the
others go on. Runs that need the same general phase share it.
"""
