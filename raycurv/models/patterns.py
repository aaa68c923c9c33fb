"""Regular expressions of a stranger's: those that match any name soon.

Python's ``re`` tries every way in which a pattern may be laid over a name: what repeats a group
that repeats takes time exponential in the name's length, and so do many parts that may be left out
or may be one of several.
"""

from __future__ import annotations

import re

MOST_PATTERN, MOST_REPEATS, MOST_GROUPS = 2_000, 6, 16
# Comments, and the flag that makes text after "#" one: in these, signs are not what they look like.
_COMMENTS = re.compile(r"\(\?(#|[aiLmsu-]*x)")


def is_bounded(pattern: str) -> bool:
    """Whether a pattern is one whose matching ends soon: it is short, no group is repeated, and few
    other things are, or may be left out; few groups, and no comments."""
    if len(pattern) > MOST_PATTERN or _COMMENTS.search(pattern):
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    plain = re.sub(r"(?s)\\.|\[[^\]]*\]", "x", pattern)
    # What follows a repeat says how greedy it is, and what opens a group of which kind it is.
    plain = re.sub(r"([*+}?])[?+]", r"\1", plain).replace("(?", "(")
    repeats = len(re.findall(r"[*+{?]", plain))
    return (
        not re.search(r"\)[*+{]", plain)
        and repeats <= MOST_REPEATS
        and (plain.count("(") <= MOST_GROUPS)
    )
