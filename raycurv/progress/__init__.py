"""How far a job is, who does what, and stopping it."""
