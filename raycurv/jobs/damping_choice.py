"""The damping of a job where a word chooses it, recorded with what it was chosen from.

    every block's Λ and weights -> density of Λ, ‖θ‖²    a task each; some thousand numbers travel
    -> the damping, one number for all blocks            run.json: facts.damping
    -> the curve about it                                tables/damping

One prior for all weights has one precision: layers with a prior each would each be damped by their
own ratio of parameters to squared norm, which foretold retraining less well (see docs/damping.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import torch

from raycurv.driver.corpus import stored_corpus
from raycurv.driver.workers import Workers, in_order
from raycurv.errors import UserError
from raycurv.files.curvature_files import CurvatureFiles
from raycurv.files.manifest import Manifest
from raycurv.files.tables import AGREEMENT, EVIDENCE, footer, read_directory, write_table
from raycurv.jobs.fitted import Fitted
from raycurv.mathematics.blocks import Block
from raycurv.mathematics.curvature import CHOSEN, Damping
from raycurv.mathematics.evidence import Density, Evidence
from raycurv.mathematics.loss.shipped import shipped_name
from raycurv.mathematics.methods import open_method
from raycurv.models.model import Model
from raycurv.stages.dealing import runs
from raycurv.stages.pool import Need

CURVE = "tables/damping"
# Of a task.
_ELEMENTS, _BLOCKS = 2.0**24, 64


def choose_damping(
    text: str, workers: Workers, fitted: Fitted, manifest: Manifest, joint: bool
) -> Damping | None:
    """The damping that a setting gives or chooses; ``None`` where removals have still to choose it.

    Args:
        text: of the setting.
        workers: of the job.
        fitted: the fit whose curvature is damped.
        manifest: of the job; a continued run keeps what it chose.
        joint: of a ranked method, whether all blocks have one Fisher.

    Raises:
        UserError: there is nothing to choose by.
    """
    if text not in CHOSEN:
        return Damping.parse(text)
    if "damping" not in manifest.facts:
        method = open_method(fitted.settings["method"])
        if not method.curved or (method.ranked and text == "heldout"):
            raise UserError(
                f"--damping {text}", "a fit with eigenvalues Λ", f"one with --method {method}",
                "Leave it out: the identity is never damped." if not method.curved else
                "Choose by evidence, or give a number.",
            )  # fmt: skip
        if text == "heldout":
            return None
        _record_evidence(workers, fitted, manifest, joint)
    _say(workers, manifest)
    return Damping.parse(used_damping(manifest))


def _record_evidence(workers: Workers, fitted: Fitted, manifest: Manifest, joint: bool) -> None:
    evidence = _evidence(workers, fitted, joint)
    # Of so many digits the number can be given again, as it is written everywhere.
    chosen = Damping(float(f"{evidence.best():.6g}"), absolute=True)
    curve = evidence.curve(chosen.value)
    columns = {
        "damping": curve,
        "log_evidence": [evidence.log_evidence(lam) for lam in curve],
        "effective_parameters": [evidence.density.effective(lam) for lam in curve],
    }
    parameters = evidence.density.effective(chosen.value)
    why = f"the evidence of the fit's {evidence.examples:,} examples, which determine "
    facts: dict[str, str | float] = {
        "why": f"{why}{parameters:,.1f} parameters",
        "log_evidence": evidence.log_evidence(chosen.value),
        "effective_parameters": parameters,
        "examples": evidence.examples,
        "weights_sq_norm": evidence.squared_norm,
        "noise_precision": evidence.precision(chosen.value),
    }
    _record(workers, manifest, "evidence", chosen, facts, pa.table(columns, schema=EVIDENCE))


def record_heldout(
    workers: Workers,
    manifest: Manifest,
    found: Mapping[Damping, tuple[float, float]],
    removals: int,
) -> Damping:
    """The damping whose scores agree best with removals, the largest of several; recorded.

    Args:
        found: agreement and standard error of each damping.
        removals: how many there were.
    """
    chosen = max(found, key=lambda one: (found[one][0], one.value))
    columns = {
        "damping": [str(one) for one in found],
        "agreement": [mean for mean, _ in found.values()],
        "standard_error": [error for _, error in found.values()],
    }
    (mean, error), (usual, _) = found[chosen], found[Damping()]
    why = f"{removals:,} removals that were tried, with which its scores agree by {mean:.3f} "
    facts: dict[str, str | float] = {
        "why": f"{why}(± {error:.3f}), those of the usual damping by {usual:.3f}",
        "agreement": mean,
        "standard_error": error,
        "usual_agreement": usual,
        "removals": removals,
    }
    _record(workers, manifest, "heldout", chosen, facts, pa.table(columns, schema=AGREEMENT))
    _say(workers, manifest)
    return chosen


def _record(
    workers: Workers,
    manifest: Manifest,
    word: str,
    chosen: Damping,
    facts: Mapping[str, str | float],
    curve: pa.Table,
) -> None:
    """Write down what a word has chosen, and from what."""
    notes = footer({"damping": word})
    write_table(workers.store, f"{CURVE}/part-00000.parquet", curve, notes)
    manifest.facts["damping"] = {"chosen_by": word, "value": str(chosen), **facts}
    manifest.write(workers.store)


def _say(workers: Workers, manifest: Manifest) -> None:
    why = manifest.facts["damping"].get("why", "")
    workers.reporter.say(f"damping {used_damping(manifest)}, by {why}")


def used_damping(manifest: Manifest) -> str:
    """The damping of a finished job, as its setting gives it or by what it chose."""
    return str(manifest.facts.get("damping", {}).get("value", manifest.settings["damping"]))


def _evidence(workers: Workers, fitted: Fitted, joint: bool) -> Evidence:
    """What the evidence of a damping of a fit is made of."""
    curvature = CurvatureFiles.of(fitted.store, fitted.manifest)
    method, blocks = curvature.method, workers.blocks
    if method.ranked and joint:
        tasks: list[list[Sequence[Block]]] = [[blocks]]
    else:
        # Small blocks share a task, which takes long to begin.
        named = {block.name: [block] for block in blocks}
        sizes = {block.name: block.d_out * block.d_in for block in blocks}
        tasks = [[named[n] for n in run] for run in runs(tuple(named), sizes, _ELEMENTS, _BLOCKS)]
    arguments = [(curvature, fitted.network, groups) for groups in tasks]
    needs = [_need(groups) for groups in tasks]
    found = in_order(workers.run_tasks("evidence", _look, arguments, needs))
    losses = read_directory(fitted.store, "tables/examples")["loss"]
    if losses.null_count:
        raise UserError(
            "--damping evidence", "a fit whose examples have labels, of which the loss is",
            f"{losses.null_count:,} without", "Give --damping as a number.",
        )  # fmt: skip
    return Evidence(
        Density.joined([density for density, _ in found]),
        sum(norm for _, norm in found),
        curvature.examples,
        float(pc.sum(losses.cast("float64")).as_py()),
        _numbers(fitted) if shipped_name(fitted.objective) == "regression" else None,
    )


def _need(groups: Sequence[Sequence[Block]]) -> Need:
    blocks = [block for group in groups for block in group]
    sizes = [block.d_out * block.d_in for block in blocks]
    # Λ as stored and in float64, its bins, and the weights likewise; of K-FAC both bases.
    bases = max(block.d_out**2 + block.d_in**2 for block in blocks)
    return Need(48 * max(sizes) + 16 * bases, 40.0 * sum(sizes), blocks[0].name, len(blocks))


def _look(
    curvature: CurvatureFiles, network: Model, groups: Sequence[Sequence[Block]]
) -> tuple[Density, float]:
    """The eigenvalues of some curvatures, each of a group of blocks, and the squared norm of these
    blocks' weights: of those that a gradient reached, for others the data decided nothing."""
    found, norm = [Density.of(torch.zeros(0))], 0.0
    for blocks in groups:
        density = Density.of(curvature.eigenvalues(blocks))
        if len(density.bins):
            found.append(density)
            weights = map(network.block_weight, blocks)
            norm += sum(float(w.double().square().sum()) for w in weights)
    return Density.joined(found), norm


def _numbers(fitted: Fitted) -> int:
    """How many numbers a regression's examples have to be predicted."""
    corpus = stored_corpus(fitted.store, "data")
    if corpus is None:
        raise UserError(
            f"--run {fitted.store.root}", "the fit's examples, for how many numbers are predicted",
            "none", "Run the fit again: it makes what is missing.",
        )  # fmt: skip
    labels = next(corpus.examples()).labels
    assert labels is not None
    return int(labels.size) * int(fitted.manifest.facts["examples"])
