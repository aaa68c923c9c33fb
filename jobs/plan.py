"""`python jobs/plan.py --help`; unchanged under `ray job submit --working-dir . -- …`."""

from loading import loading

with loading("plan.py"):
    from raycurv.driver.command import run_job
    from raycurv.driver.planning import plan
    from raycurv.driver.settings import PlanSettings

if __name__ == "__main__":
    run_job(PlanSettings, lambda settings, reporter: plan(settings), "plan.py")
