"""Ten thousand mutated headers, indices, configurations, rows and run directories, and their ends.

    python benchmarks/fuzz.py --count 10000 --seed 0

Four in ten are files of data, five in ten model directories, one in ten run directories and scores.
A case must end in what was asked for or in a mistake that is told in four parts, within 10 s. Every
500 cases have a process of their own, which must take no more than 1 GB. A case of a number is the
same however many are run. Writes ``results/DATE-fuzz.md``; exit code 1
for any fault.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import date
from functools import reduce
from pathlib import Path

import torch
from fuzz_data import data_cases
from fuzz_models import model_cases, whole_model
from fuzz_runs import run_cases
from fuzzing import Outcome, tried
from result_file import processor, source_state

SLICE = 500
MOST_SECONDS, MOST_BYTES = 10.0, 10**9
SHARES = {"data": 4, "models": 5, "runs": 1}


def tried_apart(kind: str, seed: int, numbers: range) -> Outcome:
    """Run some cases of a kind in this process, which does nothing else."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if kind == "runs":
            case: Callable[[int], str] = run_cases(place, seed)
        elif kind == "models":
            case = model_cases(whole_model(place / "good"), place, seed)
        else:
            case = data_cases(place, seed)
        return tried(case, numbers)


def main() -> None:
    """Run the cases, show faults, and write how they ended."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="cases of all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="of all cases")
    parser.add_argument("--kinds", nargs="+", choices=[*SHARES], default=[*SHARES], help="of files")
    parser.add_argument("--processes", type=int, default=2, help="at once")
    flags = parser.parse_args()
    spawned = multiprocessing.get_context("spawn")
    lines, bad = [], 0
    for kind in flags.kinds:
        count = flags.count * SHARES[kind] // sum(SHARES.values())
        slices = [range(first, min(first + SLICE, count)) for first in range(0, count, SLICE)]
        with spawned.Pool(flags.processes, maxtasksperchild=1) as pool:
            outcomes = pool.starmap(
                tried_apart, [(kind, flags.seed, numbers) for numbers in slices], chunksize=1
            )
        found = reduce(Outcome.joined, outcomes, Outcome())
        for number, text in list(found.faults.items())[:10]:
            print(f"{kind}, case {number} of seed {flags.seed}:\n{text}")
        seconds, slowest = found.slowest
        bad += bool(found.faults) or seconds > MOST_SECONDS or found.memory > MOST_BYTES
        ends = ", ".join(f"{number} {end}" for end, number in found.ends.most_common())
        lines.append(
            f"| {kind} | {count} | {ends} | {len(found.faults)} | {seconds:.2f} s (case {slowest}) "
            f"| {found.memory / 1e6:.0f} MB |"
        )
        print(lines[-1], flush=True)
    text = (
        f"# Mutated files, {date.today()}\n\n"
        f"`python benchmarks/fuzz.py --count {flags.count} --seed {flags.seed}`, {processor()}; "
        f"raycurv {source_state()}\n\n"
        "| what | cases | how they ended | faults | slowest | most memory of a process |\n"
        "|---|---|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )
    (Path(__file__).parent / "results" / f"{date.today()}-fuzz.md").write_text(text)
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
