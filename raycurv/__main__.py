"""The command `raycurv JOB --flags`, which `python -m raycurv` is too."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from typing import NoReturn

from raycurv import __version__
from raycurv.data.uri import hidden
from raycurv.errors import UserError
from raycurv.jobs.last_line import LastLine
from raycurv.jobs.registry import JOBS, start
from raycurv.progress.streams import kept_for_results, results


def main() -> None:
    """Run the job that the command line names.

    Raises:
        SystemExit: with exit code 2 for a job that there is not, else as the job says.
    """
    words = sys.argv[1:]
    if words and words[0] in JOBS:
        start(words[0], words[1:], f"raycurv {words[0]}")
        return
    with kept_for_results():
        if words and words[0] in ("--help", "-h"):
            print(_help(), file=results(), flush=True)
        elif words and words[0] == "--version":
            print(f"raycurv {__version__}", file=results(), flush=True)
        else:
            _refuse(words)


def _help() -> str:
    width = max(map(len, JOBS))
    jobs = [f"  {job.name:<{width}}  {job.help}" for job in JOBS.values()]
    return "\n".join(
        [
            "usage: raycurv JOB [--flags]",
            "",
            "Curvature of neural networks on Ray. Jobs:",
            *jobs,
            "",
            "raycurv JOB --help explains the flags of a job; raycurv --version says which this is.",
            "Under `ray job submit --working-dir . --` the same job is `python jobs/JOB.py`.",
        ]
    )


def _refuse(words: list[str]) -> NoReturn:
    """End with the mistake of a first word that is no job."""
    meant = get_close_matches(words[0], JOBS, n=1) if words else []
    remedy = f"Did you mean raycurv {meant[0]}? " if meant else ""
    got = repr(hidden(words[0])) if words else "nothing"
    wanted, remedy = f"a job: {', '.join(JOBS)}", f"{remedy}See raycurv --help."
    LastLine("raycurv").refuse(UserError("the first word", wanted, got, remedy))


if __name__ == "__main__":
    main()
