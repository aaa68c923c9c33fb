"""`python jobs/influence.py --help`; unchanged under `ray job submit --working-dir . -- …`."""

from loading import loading

with loading("influence.py"):
    from raycurv.driver.command import run_job
    from raycurv.driver.influence import influence
    from raycurv.driver.settings import InfluenceSettings

if __name__ == "__main__":
    run_job(InfluenceSettings, influence, "influence.py")
