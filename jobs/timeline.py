"""`python jobs/timeline.py --help`: a picture of what the actors of a run did, and how busy they
were."""

from loading import loading

with loading("timeline.py"):
    from raycurv.driver.settings import TimelineSettings
    from raycurv.jobs.command import run_job
    from raycurv.jobs.timeline.watching import show_timeline

if __name__ == "__main__":
    run_job(TimelineSettings, lambda settings, reporter: show_timeline(settings), "timeline.py")
