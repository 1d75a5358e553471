"""The only place where an (m, n) matrix is formed, and then one tile of it at a time.

`reference` is plain torch and runs anywhere. A faster implementation goes beside it, with the
same functions, and is chosen here.
"""

from hlora.ops.reference import accumulate, consolidate, weigh

__all__ = ["accumulate", "consolidate", "weigh"]
