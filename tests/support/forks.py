"""Programs that import torch once and fork for each trial: a crash is that of one trial."""

import faulthandler
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import fusedopt


def in_a_fork(run: Callable[[], None]) -> str:
    """What went wrong, in words; "": nothing."""
    with tempfile.TemporaryFile() as log:
        child = os.fork()
        if child == 0:
            os.dup2(log.fileno(), 2)
            faulthandler.enable()
            signal.alarm(200)  # where a lock is never let go
            status = 1
            try:
                run()
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        log.seek(0)
        said = log.read().decode(errors="replace")
    return "" if status == 0 else f"status {status}\n{said[-3000:]}"


def output_of_program(program: str, folder: Path, env: Mapping[str, str] | None = None) -> str:
    """What a Python program prints that finds the modules in this folder beside those of tests."""
    tests, root = Path(__file__).parents[1], Path(fusedopt.__file__).parents[1]
    paths = os.pathsep.join([str(folder), str(tests), str(root)])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "2", **(env or {})},
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def once(key: str, make: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What this makes, which the processes that share out the tests make once for all of them."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return make()
    path = Path(tempfile.gettempdir(), f"fusedopt-tests-{run}-{key}.json")
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        if not text:
            text = json.dumps(make())
            file.write(text)
    return dict(json.loads(text))
