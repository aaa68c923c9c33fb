"""`python jobs/plan.py --help`; unchanged under `ray job submit --working-dir . -- …`."""

from loading import loading

with loading("plan.py"):
    from raycurv.driver.settings import PlanSettings
    from raycurv.jobs.command import run_job
    from raycurv.jobs.plan.estimating import plan

if __name__ == "__main__":
    run_job(PlanSettings, lambda settings, reporter: plan(settings), "plan.py")
