"""`python jobs/influence.py --help`; unchanged under `ray job submit --working-dir . -- …`."""

from raycurv.command import run_job
from raycurv.influence import influence
from raycurv.settings import InfluenceSettings

if __name__ == "__main__":
    run_job(InfluenceSettings, influence, "influence.py")
