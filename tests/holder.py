"""A process that holds the lock of a directory: URI or path, and the rhythm of a lease.

It says ``held``, then does what it reads line by line: ``write`` a file, ``spawn`` children that
outlive it (says their process ids), ``end``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from raycurv.errors import LostLock
from raycurv.files import lease
from raycurv.files.lock import hold
from raycurv.files.store import Store


def main() -> None:
    store = Store(sys.argv[1])
    if len(sys.argv) > 2:
        lease.RHYTHM = lease.Rhythm(*map(float, sys.argv[2:5]))
    with hold(store, "fit.py"):
        print("held", flush=True)
        for line in sys.stdin:
            if line == "write\n":
                try:
                    store.write("written", [b"x"])
                    print("written", flush=True)
                except LostLock as error:
                    print(f"lost: {error}", flush=True)
            elif line == "spawn\n":
                started = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=sys.stderr)
                forked = os.fork()
                if not forked:
                    time.sleep(60)
                    os._exit(0)
                print(started.pid, forked, flush=True)
            else:
                break
    print("ended", flush=True)


if __name__ == "__main__":
    main()
