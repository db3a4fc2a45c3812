"""Which code does the work on many ranks and processes: the engine's C where it can (Linux), else Python.

Both have the same functions, described in ``without.py``. RANKSPAWN_MECHANISM=subprocess also chooses Python.
"""

from __future__ import annotations

import os
from types import ModuleType

from .._start.engine import EXTENSION_ERROR


def _chosen() -> ModuleType:
    if EXTENSION_ERROR is None and os.environ.get("RANKSPAWN_MECHANISM") != "subprocess":
        from .. import _spawn

        if _spawn.HAS_ENDS:
            return _spawn
    from . import without

    return without


way = _chosen()
