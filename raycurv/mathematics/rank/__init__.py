"""M-FAC: a Fisher of rank m as its rows, its inverse, and what is scored with it."""
