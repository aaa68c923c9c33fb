"""`python jobs/prune.py --help`; unchanged under `ray job submit --working-dir . -- …`."""

from loading import loading

with loading("prune.py"):
    from raycurv.driver.command import run_job
    from raycurv.driver.prune_settings import PruneSettings
    from raycurv.driver.pruning import prune

if __name__ == "__main__":
    run_job(PruneSettings, prune, "prune.py")
