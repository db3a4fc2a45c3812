"""The error that a rank has recorded, in the file that torch's ``@record`` writes (TORCHELASTIC_ERROR_FILE)."""

from __future__ import annotations

import json
import os

from .._frozen import Frozen
from .logs import read_regular

_MOST_BYTES = 1 << 20


class RecordedError(Frozen):
    """What a rank left in its error file (TORCHELASTIC_ERROR_FILE), as torch's ``@record`` writes it.

    Attributes:
        message: The exception in words.
        traceback: Its traceback, "" where there is none.
        time: Seconds since the epoch, whole seconds in torch's files; None where there is none.
        raw: The text of the file.
        problem: Why the file cannot be understood, or "".
    """

    message: str
    traceback: str
    time: float | None
    raw: str
    problem: str = ""


def read_error_file(path: str | os.PathLike[str]) -> RecordedError | None:
    """Read the error that a rank recorded; None where it recorded none.

    The forms are those that torch.distributed.elastic.multiprocessing.errors writes and reads: ``{"message":
    {"message": ..., "extraInfo": {"py_callstack": ..., "timestamp": ...}}}``, and ``{"message": "text"}``. A file that
    cannot be read or understood raises nothing: ``problem`` says what is wrong with it.
    """
    try:
        data, cut = read_regular(path, _MOST_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        return RecordedError("", "", None, "", f"cannot be read: {error.strerror}")
    raw = data.decode(errors="backslashreplace")
    if cut:
        return RecordedError("", "", None, raw, f"is larger than {_MOST_BYTES >> 20} MiB")
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        return RecordedError("", "", None, raw, f"is not JSON: {error}" if raw else "is empty")
    message = found.get("message") if isinstance(found, dict) else None
    if isinstance(message, str):
        return RecordedError(message, "", _seconds(found.get("timestamp")), raw)
    if not isinstance(message, dict):
        return RecordedError("", "", None, raw, "has no message")
    extra = message.get("extraInfo")
    extra = extra if isinstance(extra, dict) else {}
    text, traceback = message.get("message", ""), extra.get("py_callstack", "")
    return RecordedError(
        text if isinstance(text, str) else json.dumps(text),
        traceback if isinstance(traceback, str) else json.dumps(traceback),
        _seconds(extra.get("timestamp")),
        raw,
    )


def _seconds(timestamp: object) -> float | None:
    """A time from JSON, where torch writes it as text."""
    try:
        seconds = float(timestamp)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if 0 <= seconds < 1e11 else None


def pass_on(error: RecordedError, returncode: int, path: str | os.PathLike[str], others: str = "") -> None:
    """Write the error that ended the job to the launcher's own error file, with the rank's status as its errorCode.

    torchrun does this for the process that started it with TORCHELASTIC_ERROR_FILE. An error file that cannot be
    understood is not passed on.

    Args:
        error: What the rank recorded.
        returncode: How the rank ended, as ``Popen.returncode``.
        path: The launcher's error file.
        others: What the other ranks did then, for the error's extraInfo; "" adds nothing.

    Raises:
        OSError: The file cannot be written.
    """
    if error.problem:
        return
    from .write import write_text

    found = json.loads(error.raw)
    if isinstance(found["message"], dict):
        found["message"]["errorCode"] = returncode
        if others and isinstance(found["message"].setdefault("extraInfo", {}), dict):
            found["message"]["extraInfo"]["others"] = others
    write_text(json.dumps(found), path)
