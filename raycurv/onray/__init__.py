"""Ray at the edge: stages as actors, functions as tasks. Nothing else of raycurv imports Ray."""
