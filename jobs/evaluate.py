"""`python jobs/evaluate.py --help`; unchanged under `ray job submit --working-dir . -- …`."""

from loading import loading

with loading("evaluate.py"):
    from raycurv.driver.settings import EvaluateSettings
    from raycurv.jobs.command import run_job
    from raycurv.jobs.evaluate.evaluating import evaluate

if __name__ == "__main__":
    run_job(EvaluateSettings, evaluate, "evaluate.py")
