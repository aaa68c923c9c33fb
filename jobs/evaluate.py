"""`python jobs/evaluate.py --help`; unchanged under `ray job submit --working-dir . -- …`."""

from loading import loading

with loading("evaluate.py"):
    from raycurv.driver.command import run_job
    from raycurv.driver.evaluating import evaluate
    from raycurv.driver.settings import EvaluateSettings

if __name__ == "__main__":
    run_job(EvaluateSettings, evaluate, "evaluate.py")
