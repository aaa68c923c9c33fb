"""Command lines made from the settings' dataclasses, and the exit codes of a job."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import tyro

from raycurv.driver.displays import Event, json_line
from raycurv.errors import RaycurvError, UserError
from raycurv.files.store import Store

Settings = TypeVar("Settings")


def run_job(settings: type[Settings], job: Callable[[Settings], Any], name: str) -> None:
    """Read the command line, run the job, and exit.

    Exit code 0 when done, 2 for a user's mistake (one message, no traceback), 1 for anything else.
    The last line of the output is JSON: status, and where the results lie or what was found.
    """
    chosen = tyro.cli(
        settings,
        prog=name,
        description=settings.__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        found = job(chosen)
    except UserError as error:
        _complain(chosen, name, error)
        raise SystemExit(2) from None
    except RaycurvError as error:
        _complain(chosen, name, error)
        raise SystemExit(1) from None
    said = {"out": found.root} if isinstance(found, Store) else found
    print(json.dumps({"status": "complete", "job": name} | said))


def _complain(chosen: Any, name: str, error: Exception) -> None:
    """Say what went wrong, as everything else is said."""
    if getattr(chosen, "log", "text") == "json":
        text = json_line(Event(str(error), "failed", "error", {"job": name}))
    else:
        text = f"{name}: {error}"
    print(text, file=sys.stderr)
