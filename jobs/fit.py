"""`python jobs/fit.py --help`; unchanged under `ray job submit --working-dir . -- …`."""

from raycurv.command import run_job
from raycurv.fitting import fit
from raycurv.settings import FitSettings

if __name__ == "__main__":
    run_job(FitSettings, fit, "fit.py")
