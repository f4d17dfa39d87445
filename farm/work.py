"""One job on the machine that it is given to: the command line of `nibble`, run by path.

Ray's workers load this file by its path, from the pack that lies on their own machine; it imports
nothing but Python, and what goes in and out are strings and numbers. The command ends with whoever
runs it (its standard input closes), so a killed worker leaves no quantization behind.
"""

import collections
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

LAST_WORDS = 20  # lines of what a command said that are kept
ANSWER = ("report", "refused")  # the events that end a run
PATIENCE = 60.0  # seconds that another run of a killed worker has to let a target go
BUSY = "TargetBusy"  # quant/files/errors.py


def run(
    job: dict,
    tell: Callable[[dict], None],
    hold: Callable[[subprocess.Popen], None] = lambda process: None,
) -> dict:
    """Runs a job; returns its last event, with `worker`, `seconds`, and `at`, when it began (in
    seconds since 1970).

    job   `command`: words behind the program; `python`, `pack`: where they are, or None for this
          Python and the folder of this file; `threads`: for arithmetic, or None
    tell  called with each event of progress, as it comes
    hold  called with the process, for whoever would end it

    Raises ChildProcessError where the command was killed: the same job may be done elsewhere.
    """
    began, at = time.monotonic(), time.time()
    while True:
        answer = _once(job, tell, hold)
        seconds = round(time.monotonic() - began, 3)
        if answer.get("kind") != BUSY or seconds > job.get("patience", PATIENCE):
            return answer | {"at": round(at, 3), "seconds": seconds, "worker": name()}
        time.sleep(1)


def name() -> str:
    """What this machine is called."""
    return socket.gethostname()


def _once(job: dict, tell: Callable, hold: Callable) -> dict:
    pack = job.get("pack") or os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [job.get("python") or sys.executable, pack, *job["command"]]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    if job["threads"]:
        threads = str(job["threads"])
        environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=environment,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C is for the farm, which ends it
        )
    except OSError as error:
        return _refused(f"{command[0]} cannot be started on {name()}: {error.strerror}")
    said: collections.deque[str] = collections.deque(maxlen=LAST_WORDS)
    hold(process)
    with process:
        assert process.stdout is not None and process.stderr is not None
        listener = threading.Thread(target=said.extend, args=(process.stderr,))
        listener.start()
        answer = _heard(process.stdout, tell)
        listener.join()
    return _answer(process.returncode, answer, "".join(said).strip())


def _heard(lines, tell: Callable[[dict], None]) -> dict | None:
    """The event that ends a run, if it came."""
    answer = None
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # a package that prints
            continue
        if isinstance(event, dict) and event.get("event") in ANSWER:
            answer = event
        elif isinstance(event, dict):
            tell(event)
    return answer


def _answer(code: int, answer: dict | None, said: str) -> dict:
    if answer is not None and (code == 0 or answer["event"] == "refused"):
        return answer
    if code in (1, 2) and said:  # nibble's words, or the last line of Python's own traceback
        return _refused(said.splitlines()[-1].removeprefix("nibble: "))
    how = f"by signal {-code}" if code < 0 else f"with code {code}"
    raise ChildProcessError(f"the quantization on {name()} was ended {how}; {said[-300:]}")


def _refused(sentence: str) -> dict:
    return {"event": "refused", "kind": "FileRefused", "sentence": sentence}
