"""One folder a job, and what all jobs share: command line, checks, finished fits."""
