"""`python jobs/fit.py --help`; unchanged under `ray job submit --working-dir . -- …`."""

from loading import loading

with loading("fit.py"):
    from raycurv.driver.settings import FitSettings
    from raycurv.jobs.command import run_job
    from raycurv.jobs.fit.fitting import fit

if __name__ == "__main__":
    run_job(FitSettings, fit, "fit.py")
