"""`python jobs/influence.py --help`; unchanged under `ray job submit --working-dir . -- …`."""

from loading import loading

with loading("influence.py"):
    from raycurv.driver.settings import InfluenceSettings
    from raycurv.jobs.command import run_job
    from raycurv.jobs.influence.scoring import influence

if __name__ == "__main__":
    run_job(InfluenceSettings, influence, "influence.py")
