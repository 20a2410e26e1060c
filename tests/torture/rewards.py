"""Hostile reward servers and functions: each call ends within its deadline, in scores or in one
line that names the source, the next call is right, and no process is left.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import signal
import socketserver
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

from warpo.engine.errors import RewardError
from warpo.engine.rollout.rewards.calls import Calls
from warpo.engine.rollout.rewards.function import RewardFunction
from warpo.engine.rollout.rewards.server import RewardServer

COMPLETIONS = ["ab", "cdé"]
# Beside the deadline: the start of a worker and the end of its processes, on a busy machine.
SLACK_S = 20.0
PASSWORD = "h%75nter-2"


def _reply(body: bytes | str, status: str = "200 OK", headers: str = "") -> bytes:
    body = body.encode() if isinstance(body, str) else body
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


def _rewards(scores: str) -> bytes:
    return _reply(f'{{"rewards": {scores}}}')


def _zipped(body: bytes, headers: str = "Content-Encoding: gzip\r\n") -> bytes:
    return _reply(body, headers=headers)


def _chunked(*chunks: str) -> bytes:
    return ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + "".join(chunks)).encode()


_GOOD = '{"rewards": [2, 3.5]}'
_ENDS = r"its end must be in"
_NUMBERS = r"must return a list of 2 numbers or lists of \[end, score\]"
_LATE = r"gave no rewards for 2 completions within"
# name: (what the server writes, or a list of pieces that it repeats without end; the scores, or
# what the error says)
REPLIES: dict[str, tuple[bytes | list[bytes], list | str]] = {
    "plain": (_reply(_GOOD), [2.0, 3.5]),
    "gzip": (_zipped(gzip.compress(_GOOD.encode())), [2.0, 3.5]),
    "chunked": (_chunked("5\r\n", _GOOD[:5], "\r\n10\r\n", _GOOD[5:], "\r\n0\r\n\r\n"), [2.0, 3.5]),
    "utf-16": (_reply(_GOOD.encode("utf-16")), [2.0, 3.5]),
    "booleans": (_rewards("[true, false]"), [1.0, 0.0]),
    "steps": (_rewards("[[[1, 0.5], [2, 1]], []]"), [[(1, 0.5), (2, 1.0)], []]),
    "more keys": (_reply('{"rewards": [0, -1], "detail": [[{}]]}'), [0.0, -1.0]),
    "until it closes": (b"HTTP/1.1 200 OK\r\n\r\n" + _GOOD.encode(), [2.0, 3.5]),
    "old protocol": (b"HTTP/1.0 200 OK\r\n\r\n" + _GOOD.encode(), [2.0, 3.5]),
    "400 digits": (_rewards(f"[1, {'9' * 400}]"), "returned inf for completion 1"),
    "5000 digits": (_rewards(f"[1, {'9' * 5000}]"), "answered with JSON that cannot be read"),
    "exponent": (_rewards("[1, 1e999]"), "returned inf for completion 1"),
    "nan": (_rewards("[NaN, 1]"), "returned nan for completion 0"),
    "minus infinity": (_rewards("[1, -Infinity]"), "returned -inf for completion 1"),
    "no scores": (_rewards("[]"), f"{_NUMBERS}, one for each completion, returned 0"),
    "too few": (_rewards("[1]"), f"{_NUMBERS}, one for each completion, returned 1"),
    "too many": (_rewards("[1, 2, 3]"), f"{_NUMBERS}, one for each completion, returned 3"),
    "null scores": (_rewards("[null, 1]"), rf"{_NUMBERS}, returned None for completion 0"),
    "text scores": (_rewards('["1", "2"]'), rf"{_NUMBERS}, returned '1' for completion 0"),
    "objects": (_rewards('[{"score": 1}, {}]'), rf"{_NUMBERS}, returned {{'score': 1}} for"),
    "one text": (_rewards('"ab"'), rf"{_NUMBERS}, returned str"),
    "one number": (_rewards("1"), rf"{_NUMBERS}, returned int"),
    "a mapping": (_rewards('{"0": 1, "1": 2}'), rf"{_NUMBERS}, returned dict"),
    "null": (_rewards("null"), rf"{_NUMBERS}, returned NoneType"),
    "both kinds": (_rewards("[1, [[1, 1]]]"), "returned both"),
    "step past the end": (_rewards("[[[3, 1]], []]"), _ENDS),
    "step of no length": (_rewards("[[[0, 1]], []]"), _ENDS),
    "steps that fall": (_rewards("[[[2, 1], [1, 1]], []]"), _ENDS),
    "half an end": (_rewards("[[[1.5, 1]], []]"), r"the step \[1.5, 1\] .* wanted \[end, score\]"),
    "end of 400 digits": (_rewards(f"[[[{'9' * 400}, 1]], []]"), _ENDS),
    "infinite step": (_rewards("[[[1, 1e999]], []]"), "returned inf for completion 0"),
    "flat steps": (_rewards("[[1, 0.5], []]"), "returned the step 1 for completion 0"),
    "no rewards": (_reply('{"scores": [1, 2]}'), r'must reply \{"rewards": \[...\]\}, replied'),
    "a list": (_reply("[1, 2]"), r'must reply \{"rewards": \[...\]\}, replied \[1, 2\]'),
    "large and wrong": (_reply(json.dumps({"x": ["y" * 99] * 99_999})), "must reply .*, replied"),
    "nested": (_rewards("[" * 200_000), "answered with JSON that cannot be read"),
    "nested objects": (_reply('{"a":' * 200_000), "answered with JSON that cannot be read"),
    "cut JSON": (_reply(_GOOD[:-3]), "answered with no JSON"),
    "empty": (_reply(""), "answered with no JSON: ''"),
    "HTML": (_reply("<html><body>Sign in"), "answered with no JSON: '<html>"),
    "not UTF-8": (_reply(b'{"rewards": [1, "\xff\xfe"]}'), "answered with no JSON"),
    "lone surrogate": (_rewards('["\\ud800", 1]'), r"returned '\\ud800' for completion 0"),
    "control codes": (_rewards('["\\u001b[2J", 1]'), r"returned '\\x1b\[2J' for completion 0"),
    "bad gzip": (_zipped(b"no gzip at all"), "replied what is not gzip, as it says it is"),
    "cut gzip": (_zipped(gzip.compress(_GOOD.encode())[:-9]), "replied gzip that is cut short"),
    "gzip, not told": (_reply(gzip.compress(_GOOD.encode())), "answered with no JSON"),
    "brotli": (_zipped(b"\x0b", "Content-Encoding: br\r\n"), "replied in Content-Encoding br"),
    "gzip twice": (
        _zipped(gzip.compress(gzip.compress(b"1")), "Content-Encoding: gzip, gzip\r\n"),
        "replied in Content-Encoding gzip, gzip",
    ),
    "gzip bomb": (_zipped(gzip.compress(bytes(80 << 20), 1)), "replied more than 64 MiB"),
    "created": (_reply(_GOOD, "201 Created"), "answered with status 201"),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", "answered with status 204"),
    "redirect": (_reply("", "302 Found", "Location: /plain\r\n"), "answered with status 302"),
    "unauthorized": (_reply("who?", "401 No"), "answered with status 401: 'who\\?'"),
    "echo": (_reply("no /x?token=letmein-7 for hunter-2", "403 No"), "'no /x.*=... for ...'"),
    "odd status": (_reply("x", "799 Odd"), "answered with status 799: 'x'"),
    "long error": (_reply("x" * 10_000_000, "400 Bad"), "answered with status 400: 'xxx"),
    "busy": (_reply("later", "503 Busy"), f"{_LATE}.*status 503: 'later'.*check the server's log"),
    "teapot gzip": (_zipped(b"x")[:9] + b"418" + _zipped(b"x")[12:], "answered with status 418"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n", f"{_LATE}.*the URL is that of an HTTP server"),
    "only garbage": (bytes(range(256)) * 9, f"{_LATE}.*the URL is that of an HTTP server"),
    "nothing": (b"", f"{_LATE}.*the URL is that of an HTTP server"),
    "half a head": (b"HTTP/1.1 200 OK\r\nContent-Le", f"{_LATE}.*HTTP server"),
    "cut body": (_reply(_GOOD)[:-5], f"{_LATE}.*peer closed connection"),
    "bad length": (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", f"{_LATE}.*HTTP server"),
    "two lengths": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n" + _GOOD.encode(),
        f"{_LATE}.*HTTP server",
    ),
    "bad chunk": (_chunked("zz\r\n", _GOOD), f"{_LATE}.*HTTP server"),
    "cut chunks": (_chunked("5\r\n", _GOOD[:5]), f"{_LATE}.*peer closed connection"),
    "huge head": (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 99_999, f"{_LATE}.*HTTP server"),
    "endless head": ([b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 999], f"{_LATE}.*HTTP server"),
    "endless body": ([b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536], "replied more than 64 MiB"),
    "dribble": ([b"HTTP/1.1 200 OK\r\n\r\n", b""], f"{_LATE}.*raise reward.deadline_s"),
    "continue": ([b"", b"HTTP/1.1 100 Continue\r\n\r\n"], f"{_LATE}.*raise reward.deadline_s"),
}

# Each function is right where it is not attacked: the length of each completion.
FUNCTIONS: dict[str, tuple[str, str]] = {
    "loops": ("while True: pass", "took longer"),
    "loops in C": ("sum(range(10**13))", "took longer"),
    "sleeps": ("time.sleep(1000)", "took longer"),
    "ignores signals": (
        "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 3, 10, 12, 14, 15)]\n"
        "while True: time.sleep(1)",
        "took longer",
    ),
    "handles SIGALRM": (
        "signal.signal(signal.SIGALRM, lambda *_: signal.alarm(1000))\nsignal.alarm(1)\n"
        "while True: time.sleep(1)",
        "took longer",
    ),
    "a child in a session of its own": (
        "if not os.fork():\n    os.setsid()\n    time.sleep(1000)\ntime.sleep(1000)",
        "took longer",
    ),
    "dies, its child holds the pipe": (
        "if not os.fork():\n    os.setsid()\n    time.sleep(1000)\nos._exit(3)",
        "exit code 3",
    ),
    "a daemon forked twice": (
        "if not os.fork():\n    os.setsid()\n    if not os.fork():\n        time.sleep(1000)\n"
        "    os._exit(0)\ntime.sleep(1000)",
        "took longer",
    ),
    "a shell that starts others": (
        "subprocess.Popen('setsid sh -c \"sleep 1000 & sleep 1000\" & nohup sleep 1000',"
        " shell=True)\ntime.sleep(1000)",
        "took longer",
    ),
    "many processes": (
        "for _ in range(5): os.fork()\nos.setsid() if os.getpid() != os.getsid(0) else 0\n"
        "time.sleep(1000)",
        "took longer",
    ),
    "stops its keeper": ("os.kill(os.getppid(), signal.SIGSTOP)\ntime.sleep(1000)", "took longer"),
    "ends its keeper": ("os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(1000)", "exit code 0"),
    "kills its keeper": ("os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(1000)", "SIGKILL"),
    "kills its group": ("os.killpg(0, signal.SIGKILL)", "signal SIGKILL"),
    "leaves": ("os._exit(7)", "died with exit code 7"),
    "leaves through Python": ("sys.exit(5)", "died with exit code 5"),
    "crashes": ("os.kill(os.getpid(), signal.SIGSEGV)", "died with signal SIGSEGV"),
    "becomes another program": ("os.execvp('sleep', ['sleep', '1000'])", "closed its connection"),
    "closes every file": ("os.closerange(3, 999)\nreturn [2, 3]", "died with exit code 0"),
    "writes into the pipe": (
        "for fd in range(3, 99):\n    try: os.write(fd, b'x' * 64)\n    except OSError: pass\n"
        "return [2, 3]",
        "sent something that is not an answer",
    ),
    "answers ahead": (
        "import struct\nbody = b'[\"ok\", [9, 9]]'\n"
        "for fd in range(3, 99):\n"
        "    try: os.write(fd, struct.pack('!4sQQ', b'wrpo', 7, len(body)) + body)\n"
        "    except OSError: pass\nreturn [2, 3]",
        "sent the answer to another call",
    ),
    "promises a huge answer": (
        "import struct\n"
        "for fd in range(3, 99):\n"
        "    try: os.write(fd, struct.pack('!4sQQ', b'wrpo', 1, 1 << 60))\n"
        "    except OSError: pass\nreturn [2, 3]",
        "sent more than 64 MiB",
    ),
    "takes memory": ("x = []\nwhile True: x.append(bytes(1 << 24))", r"reward.memory_gib = 0\.5"),
    "takes memory at once": ("return bytes(1 << 40)", r"reward.memory_gib = 0\.5"),
    "returns much": ("return range(10**15)", _NUMBERS),
    "returns long text": ("return ['x' * 10**7] * 2", "returned 'xxx"),
    "returns long integers": ("return [10**5000] * 2", "returned inf for completion 0"),
    "returns steps of long integers": (
        "return [[(10**5000, 1)], []]",
        "the step .* for completion 0",
    ),
    "raises much": ("raise ValueError('x' * 10**6)", "raised\nTraceback"),
    "raises a URL": (
        "raise ValueError('https://me:hunter-2@h/x?key=letmein-7')",
        r"https://\*\*\*@h/x\?key=\*\*\*",
    ),
    "never awakes": ("import asyncio\nreturn asyncio.sleep(1000)", "took longer"),
}
# name: what the function does and returns rightly, whatever else is left running
HARMLESS: dict[str, str] = {
    "forks, and both return": "os.fork()\nreturn [len(text) for text in completions]",
    "forks, and the child returns late": (
        "if not os.fork(): time.sleep(0.2)\nreturn [len(text) for text in completions]"
    ),
    "leaves a thread": (
        "import threading\nthreading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "return [len(text) for text in completions]"
    ),
    "leaves a process": (
        "subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "return [len(text) for text in completions]"
    ),
    "is awaited": (
        "import asyncio\nasync def scores():\n    await asyncio.sleep(0.01)\n"
        "    return [len(text) for text in completions]\nreturn scores()"
    ),
    "prints": "print('x' * 10**5)\nreturn [len(text) for text in completions]",
}
_IMPORTS = "import os, signal, subprocess, sys, time\n"


def write_module(folder: Path) -> dict[str, str]:
    """hostile.py in the folder; "hostile:function" of each name."""
    bodies = {name: body for name, (body, _) in FUNCTIONS.items()} | HARMLESS
    specs, text = {}, _IMPORTS
    for name, body in bodies.items():
        function = re.sub(r"\W", "_", name)
        specs[name] = f"hostile:{function}"
        lines = [
            "if completions == ['good']: return [4.0]",
            "open('called', 'w').close()",
            *body.splitlines(),
        ]
        text += f"def {function}(completions):\n" + "".join(f"    {line}\n" for line in lines)
    (folder / "hostile.py").write_text(text)
    return specs


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        server: ReplyServer = self.server  # type: ignore[assignment]
        if not (request := self.rfile.readline()):
            return
        path, length = request.split()[1].decode(), 0
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            server.headers[name.decode().lower()] = value.decode().strip()
            if name.lower() == b"content-length":
                length = int(value)
        self.rfile.read(length)
        reply = server.replies[unquote(path.partition("?")[0][1:])]
        with contextlib.suppress(OSError):
            if isinstance(reply, bytes):
                self.wfile.write(reply)
                return
            self.wfile.write(reply[0])
            while not server.closed:
                self.wfile.write(reply[1])
                time.sleep(0.0 if reply[1] else 0.05)


class ReplyServer(socketserver.ThreadingTCPServer):
    """Answers a request for /NAME with that of REPLIES or of `others`, byte for byte."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, **others: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies = {name: reply for name, (reply, _) in REPLIES.items()} | others
        self.headers: dict[str, str] = {}
        self.closed = False

    def __enter__(self) -> ReplyServer:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True
        self.shutdown()
        self.server_close()

    def url(self, name: str) -> str:
        """With a password, which no message may show."""
        host = f"127.0.0.1:{self.server_address[1]}"
        return f"http://me:{PASSWORD}@{host}/{quote(name)}?token=letmein-7"


def ask_server(url: str, deadline_s: float) -> list | str:
    """The scores, or what the error says."""
    server = RewardServer(url, deadline_s=deadline_s, fields=["prompt"])
    call = Calls(server, on_error="stop", deadline_s=deadline_s)
    try:
        return call(COMPLETIONS, {"prompt": ["p", "q"]}).scores
    except RewardError as error:
        return str(error)


def check_reply(server: ReplyServer, name: str) -> str | None:
    """None, or what is wrong with what the engine makes of a reply."""
    wanted = REPLIES[name][1]
    wrong: str | None = None
    # The short deadline of those that never end is too short for a busy machine at times.
    for deadline_s in (0.3, 5.0) if _LATE in wanted else (10.0,):
        start = time.monotonic()
        got = ask_server(server.url(name), deadline_s)
        took = time.monotonic() - start
        if took > deadline_s + SLACK_S:
            wrong = f"reply {name!r}: took {took:.1f} s"
        elif isinstance(wanted, str):
            wrong = _wrong_line(f"reply {name!r}", got, wanted)
        else:
            wrong = None if got == wanted else f"reply {name!r}: wanted {wanted}, got {got}"
        if wrong is None:
            break
    return wrong


def _wrong_line(place: str, got: object, wanted: str) -> str | None:
    if not isinstance(got, str) or not re.search(wanted, got):
        return f"{place}: wanted an error with {wanted!r}, got {got!r:.500}"
    if "raised\n" not in got and len(got.splitlines()) > 1:
        return f"{place}: more than a line: {got!r:.500}"
    if any(secret in got for secret in ("hunter-2", PASSWORD, "letmein-7")):
        return f"{place}: shows a password: {got}"
    return None


def attack_reply(seed: int) -> str | None:
    """One of the replies, or a good one with damage."""
    names = list(REPLIES)
    if seed < len(names):
        with ReplyServer() as server:
            return check_reply(server, names[seed])
    rng = random.Random(seed)
    good = [reply for reply, scores in REPLIES.values() if isinstance(scores, list)]
    reply = _damaged(rng, bytes(rng.choice(good)))
    with ReplyServer(x=reply) as server:
        try:
            got = ask_server(server.url("x"), 0.5)
        except Exception as error:
            return f"reply {reply!r}: {type(error).__name__}: {error}"
    if isinstance(got, list):
        return None if len(got) == 2 else f"reply {reply!r}: {got}"
    return _wrong_line(f"reply {reply!r}", got, "reward server")


def _damaged(rng: random.Random, reply: bytes) -> bytes:
    damaged = bytearray(reply)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(damaged) + 1)
        match rng.randrange(4):
            case 0:
                del damaged[place:]
            case 1:
                del damaged[place : place + rng.randint(1, 9)]
            case 2:
                damaged[place:place] = rng.randbytes(rng.randint(1, 9))
            case 3:
                damaged[place : place + 1] = rng.choice(
                    [b"9" * 400, b"[[", b'"', b"-", b"\0", b"e"]
                )
    return bytes(damaged)


@contextlib.contextmanager
def marked() -> Iterator[str]:
    """An environment variable that each process started within inherits."""
    mark = f"WARPO_TORTURE={uuid.uuid4().hex}"
    name, _, value = mark.partition("=")
    os.environ[name] = value
    try:
        yield mark
    finally:
        del os.environ[name]


def processes_left(mark: str, within_s: float = 0.0) -> list[str]:
    """Command lines of the processes with the mark that do not end within the time."""
    deadline = time.monotonic() + within_s
    while True:
        left = []
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if process.name.isdecimal() and mark.encode() in (process / "environ").read_bytes():
                    command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                    left.append(f"{process.name} {command.decode(errors='replace'):.60}")
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def check_function(folder: Path, name: str) -> str | None:
    """None, or what is wrong with how the engine bears a function."""
    deadline_s = 0.5 if FUNCTIONS.get(name, ("", ""))[1] == "took longer" else 10.0
    spec = write_module(folder)[name]
    place = f"function {name!r}"
    with contextlib.chdir(folder), marked() as mark:
        function = RewardFunction(spec, deadline_s=deadline_s, fields=[], memory_gib=0.5)
        with contextlib.closing(Calls(function, on_error="stop", deadline_s=deadline_s)) as call:
            start = time.monotonic()
            wrong = _wrong_call(call, place, name)
            if time.monotonic() - start > deadline_s + SLACK_S:
                wrong = f"{place}: took {time.monotonic() - start:.1f} s"
            function._deadline_s = SLACK_S
            for _ in range(2):
                if not wrong and (scores := call(["good"], {}).scores) != [4.0]:
                    wrong = f"{place}: the next call gave {scores}"
        if left := processes_left(mark):
            wrong = wrong or f"{place}: left {left}"
    return wrong


def _wrong_call(call: Calls, place: str, name: str) -> str | None:
    try:
        got: object = call(COMPLETIONS, {}).scores
    except RewardError as error:
        got = str(error)
    if name in HARMLESS:
        return None if got == [2.0, 3.0] else f"{place}: got {got!r:.500}"
    return _wrong_line(place, got, FUNCTIONS[name][1])


_ENGINE = """\
import sys
from warpo.engine.rollout.rewards.calls import Calls
from warpo.engine.rollout.rewards.function import RewardFunction
function = RewardFunction(sys.argv[1], deadline_s=600, fields=[])
call = Calls(function, on_error="stop", deadline_s=600)
print(call(["ab", "cd"], {}), flush=True)
import time; time.sleep(600)
"""


def check_killed_engine(folder: Path, name: str) -> str | None:
    """None, or what outlives an engine that is killed while it waits for a function."""
    spec = write_module(folder)[name]
    called = folder / "called"
    called.unlink(missing_ok=True)
    with marked() as mark:
        engine = subprocess.Popen(
            [sys.executable, "-c", _ENGINE, spec],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while not called.exists() and engine.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.Random(name).uniform(0.0, 0.3))
        engine.send_signal(signal.SIGKILL)
        left = processes_left(mark, 5.0)
        if left:
            return f"function {name!r}: the killed engine left {left}"
        # Whoever held its end is gone.
        _, told = engine.communicate(timeout=10)
    if "Connection" in told or "BrokenPipe" in told:
        return f"function {name!r}: a worker of the killed engine wrote {told[-500:]}"
    return None


def attack(seed: int, folder: Path) -> str | None:
    """One attack, decided by the seed; None, or a line of what went wrong."""
    names = [*FUNCTIONS, *HARMLESS]
    kind, index = seed % 3, seed // 3
    if kind == 0:
        return attack_reply(index)
    if kind == 1:
        return check_function(folder, names[index % len(names)])
    return check_killed_engine(folder, names[index % len(names)])
