"""Puts what an agent knows of a rank that died of a signal into torch's text about it (torch 2.14 and newer)."""

from __future__ import annotations

from typing import Any

from torch.distributed.elastic.multiprocessing.errors import handlers

_TORCHS_ERROR_HANDLER = handlers.get_error_handler

_known: dict[str, str] = {}
"""What is known of ranks that died of a signal, by their message or their error file."""


def note(failure: Any, what: str) -> None:
    """Keep what is known of torch's ProcessFailure, for the hook."""
    # Without an error file torch says "<N/A>"; its message has the number of the process.
    if isinstance(failure.message, str):
        _known[failure.message] = what
    else:
        _known[failure.error_file] = what


def forget() -> None:
    """Forget all, because new ranks start."""
    _known.clear()


def get_error_handler() -> Any:
    """torch's error handler, whose text about a death by signal now has what is known of the rank."""
    handler = _TORCHS_ERROR_HANDLER()
    torchs = getattr(handler, "maybe_enrich_signal_failure_message", None)
    if torchs is not None:

        def enriched(message: str, error_file: str) -> str:
            text: str = torchs(message, error_file)
            what = _known.get(message) or _known.get(error_file)
            return f"{text}: {what}" if what else text

        handler.maybe_enrich_signal_failure_message = enriched
    return handler
