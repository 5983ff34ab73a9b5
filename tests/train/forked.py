"""train.py in fresh processes that need not import it again: they are forked from one that has done so.

Forking is safe here: no backend has started when it happens, and that process has no thread of its own.
"""

import itertools
import json
import os
import pkgutil
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Forked:
    """One run of train.py, with the methods of `subprocess.Popen` that the tests use."""

    def __init__(self, server: "Server", pid: int) -> None:
        self.server, self.pid, self.returncode = server, pid, None
        self._end = os.pidfd_open(pid)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._end], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("train.py", timeout)
            self.returncode = self.server.ask(wait=self.pid)
            os.close(self._end)
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """The process that forks; it ends when its input does, and what it has started is killed."""

    def __init__(self, environment: dict[str, str]) -> None:
        call = [sys.executable, "-m", "tests.train.forked"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.environment = environment
        self.process = subprocess.Popen(call, cwd=ROOT, env=environment, **pipes)
        self.started: list[Forked] = []

    def ask(self, **question: Any) -> int:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, out: Path, err: Path, *words: Any, before: str = "", **environment: str) -> Forked:
        """Starts train.py.

        Args:
          out: File of its output.
          err: File of its errors.
          *words: Of the command line.
          before: Python that runs first, in that process.
          **environment: Variables to set there.

        Returns:
          The process.
        """
        files, told = [str(out), str(err)], [str(word) for word in words]
        pid = self.ask(files=files, words=told, before=before, environment=environment)
        self.started.append(Forked(self, pid))
        return self.started[-1]

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def signal_at(where: str, number: int, call: int, delay: float) -> str:
    """What a process may run first, so that a signal comes to it.

    Args:
      where: Function or method, as "module:name".
      number: The signal.
      call: Which call of it is meant, from 1.
      delay: Seconds from there on; the next call waits for the signal, so that it comes before, on any machine.

    Returns:
      Python.
    """
    return f"from tests.train.forked import send_at; send_at({where!r}, {int(number)}, {call}, {delay})"


def send_at(where: str, number: int, call: int, delay: float) -> None:
    """Sends this process a signal, so long after a call; the arguments are those of `signal_at`."""
    module, _, path = where.partition(":")
    *owner, name = path.split(".")
    holder = pkgutil.resolve_name(":".join([module, *owner]))
    function, calls = getattr(holder, name), itertools.count(1)
    timer = threading.Timer(delay, lambda: os.kill(os.getpid(), number))

    def counted(*arguments: Any, **named: Any) -> Any:
        now = next(calls)
        if now == call and not delay:
            os.kill(os.getpid(), number)
        elif now == call:
            timer.start()
        elif now == call + 1 and delay:
            timer.join()
        return function(*arguments, **named)

    setattr(holder, name, counted)


def serve() -> None:
    """Body of that process."""
    import train
    from r1jax.errors import run_main

    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            for number, path in enumerate(asked["files"], 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.environ.update(asked["environment"])
            sys.argv = ["train.py", *asked["words"]]
            exec(asked["before"], {})
            run_main(train.main)
        print(child, flush=True)


if __name__ == "__main__":
    serve()
