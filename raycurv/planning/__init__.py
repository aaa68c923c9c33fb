"""What a job takes before it runs: memory, disk, bytes moved, FLOPs, time; and whether it fits."""
