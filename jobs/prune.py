"""`python jobs/prune.py --help`; unchanged under `ray job submit --working-dir . -- …`."""

from loading import loading

with loading("prune.py"):
    from raycurv.jobs.command import run_job
    from raycurv.jobs.prune.prune_settings import PruneSettings
    from raycurv.jobs.prune.pruning import prune

if __name__ == "__main__":
    run_job(PruneSettings, prune, "prune.py")
