"""`python jobs/spectrum.py --help`; unchanged under `ray job submit --working-dir . -- …`."""

from raycurv.jobs.registry import start

if __name__ == "__main__":
    start("spectrum")
