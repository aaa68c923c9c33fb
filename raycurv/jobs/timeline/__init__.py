"""The timeline job: what each actor did and when, as a trace, a picture and sums of seconds."""
