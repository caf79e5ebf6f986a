"""Points between two writes at which a test ends or halts the process, as a power cut would.

LAPIS_FAULT=<file>:<stage> kills at the first time that point is passed, <file>:<stage>:<n> at the
n-th, <file>:<stage>:<n>:wait halts there for two seconds instead. Without it nothing happens.
"""

import os
import signal
import time

_file, _stage, _count, _action = (os.environ.get("LAPIS_FAULT", "").split(":") + [""] * 4)[:4]
_wanted = f"{_file}:{_stage}"
_left = int(_count or 1)


def point(file: str, stage: str) -> None:
    """Pass the point `stage` of writing `file`."""
    global _left
    if f"{file}:{stage}" != _wanted:
        return
    _left -= 1
    if _left == 0 and _action == "wait":
        time.sleep(2)
    elif _left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
