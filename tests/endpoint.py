"""What Ray's Prometheus endpoints show of raycurv."""

from __future__ import annotations

import re
import time
import urllib.request
from collections import Counter

import ray


def scraped() -> dict[tuple[str, str], float]:
    """What Ray's Prometheus endpoints show of raycurv: (name, tags of ours) -> value, over all
    processes."""
    found: Counter[tuple[str, str]] = Counter()
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        for line in text.splitlines():
            if line.startswith("ray_raycurv_"):
                name, _, rest = line.partition("{")
                tags, _, value = rest.rpartition("} ")
                found[name.removeprefix("ray_raycurv_"), ours(tags)] += float(value)
    return dict(found)


def ours(tags: str) -> str:
    """``actor kind``, of all the tags that Ray adds its own to."""
    pairs = dict(re.findall(r'(\w+)="([^"]*)"', tags))
    return " | ".join(pairs[name] for name in ("actor", "kind", "what", "task") if name in pairs)


def settled(before: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """The metrics of what came since, once two readings have brought nothing new."""
    last: dict[tuple[str, str], float] = {}
    same, deadline = 0, time.monotonic() + 15
    while same < 2 and time.monotonic() < deadline:
        time.sleep(0.7)
        now = scraped()
        same = same + 1 if now == last and now != before else 0
        last = now
    totals = {key: value - before.get(key, 0.0) for key, value in last.items()}
    return {key: v if key[0].endswith("_total") else last[key] for key, v in totals.items()}
