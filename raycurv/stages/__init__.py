"""Who holds what and in which order: stages, passes, schedules, and Ray at the edge."""
