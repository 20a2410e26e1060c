"""Against a real server process: what goes over the wire, retries, deadline, refusals."""

import base64
import json
import subprocess
import sys
import threading
import time

import pytest

from tests.torture import rewards
from warpo.engine.errors import RewardError
from warpo.engine.rollout.rewards.calls import Calls
from warpo.engine.rollout.rewards.server import RewardServer

# The path says how the server behaves; the requests it saw stand in seen.jsonl.
SERVER = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

calls = {}

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open("seen.jsonl", "a") as seen:
            seen.write(json.dumps(request) + "\\n")
        name = self.path[1:]
        calls[name] = calls.get(name, 0) + 1
        completions = request["completions"]
        lengths = [len(text) for text in completions]
        match name:
            case "bad": self.reply(400 if "ab" in completions else 200, {"rewards": lengths})
            case "lengths": self.reply(200, {"rewards": lengths})
            case "steps": self.reply(200, {"rewards": [[[len(t), 0.5]] for t in completions]})
            case "flaky": self.reply(500 if calls[name] < 3 else 200, {"rewards": lengths})
            case "drops":
                if calls[name] == 1:
                    self.connection.close()
                else:
                    self.reply(200, {"rewards": lengths})
            case "overloaded": self.reply(503, {"detail": "all busy"})
            case "hangs": time.sleep(60)
            case "dribbles":
                self.send_response(200)
                self.end_headers()
                while True:
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.05)
            case _: self.reply(404, {"detail": "no such path"})

    def reply(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def url(folder):
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=folder, stdout=subprocess.PIPE, text=True
    ) as server:
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()


FIELDS = {"prompt": ["2+3=", [{"role": "user", "content": "é"}]], "answer": ["5", 6]}


def ask(url, deadline_s=10.0, fields=FIELDS, on_error="stop", completions=("ab", "cdé"), **options):
    server = RewardServer(url, deadline_s=deadline_s, fields=list(fields), **options)
    return Calls(server, on_error=on_error, deadline_s=deadline_s)(completions, fields).scores


def test_the_request_and_the_reply_are_as_documented(url, folder):
    assert ask(f"{url}/lengths") == [2.0, 3.0]
    request = json.loads((folder / "seen.jsonl").read_text().splitlines()[-1])
    assert request == {
        "completions": ["ab", "cdé"],
        "prompts": FIELDS["prompt"],
        "answer": ["5", 6],
    }
    assert ask(f"{url}/steps") == [[(2, 0.5)], [(3, 0.5)]]


def test_passing_failures_are_tried_again(url):
    assert ask(f"{url}/flaky") == [2.0, 3.0]
    assert ask(f"{url}/drops") == [2.0, 3.0]


@pytest.mark.parametrize(
    ("path", "last", "cure"),
    [
        ("hangs", "no answer yet", "raise reward.deadline_s"),
        ("dribbles", "no answer yet", "raise reward.deadline_s"),
        ("overloaded", r"status 503: '\{\"detail\": \"all busy\"\}'", "check the server's log"),
    ],
)
def test_the_deadline_holds_for_the_whole_call(url, path, last, cure):
    start = time.perf_counter()
    with pytest.raises(
        RewardError,
        match=rf"reward server {url}/{path} gave no rewards for 2 completions within 0.7 s "
        rf"\(last: {last}\): {cure}",
    ):
        ask(f"{url}/{path}", deadline_s=0.7)
    # What the deadline leaves is for a busy machine.
    assert 0.6 < time.perf_counter() - start < 5


def test_the_deadline_holds_where_a_name_server_does_not_answer(monkeypatch):
    answered = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: answered.wait(30))
    start = time.perf_counter()
    with pytest.raises(RewardError, match="gave no rewards for 2 completions within 0.2 s"):
        ask("http://somewhere.example", deadline_s=0.2)
    assert time.perf_counter() - start < 5
    answered.set()


def test_a_server_that_is_not_there_is_told():
    with pytest.raises(
        RewardError, match=r"127.0.0.1:1 gave no .*last: ConnectError: .*connection"
    ):
        ask("http://127.0.0.1:1", deadline_s=0.7)


def test_requests_run_at_the_same_time_and_replies_stay_in_order(url, folder):
    fields = {"answer": [str(i) for i in range(5)]}
    completions = ["x" * i for i in range(5)]
    seen = len((folder / "seen.jsonl").read_text().splitlines())
    scores = ask(f"{url}/lengths", fields=fields, completions=completions, workers=3)
    assert scores == [0.0, 1.0, 2.0, 3.0, 4.0]
    lines = (folder / "seen.jsonl").read_text().splitlines()[seen:]
    assert sorted(json.loads(line)["answer"] for line in lines) == [["0"], ["1", "2"], ["3", "4"]]


def test_zero_scores_what_the_server_refuses(url):
    assert ask(f"{url}/bad", on_error="zero") == [0.0, 3.0]
    with pytest.raises(RewardError, match=r"/bad answered with status 400"):
        ask(f"{url}/bad")


@pytest.fixture(scope="module")
def hostile():
    with rewards.ReplyServer() as server:
        yield server


@pytest.mark.parametrize("name", rewards.REPLIES)
def test_every_reply_gives_scores_or_a_line_with_its_cure(hostile, name):
    assert rewards.check_reply(hostile, name) is None


@pytest.mark.slow
def test_damaged_replies_give_scores_or_a_line():
    seeds = range(len(rewards.REPLIES), len(rewards.REPLIES) + 40)
    assert [wrong for wrong in map(rewards.attack_reply, seeds) if wrong] == []


def test_credentials_come_from_the_url_or_netrc(hostile, tmp_path, monkeypatch):
    def authorization(url):
        hostile.headers.clear()
        assert ask(url) == [2.0, 3.5]
        return hostile.headers.get("authorization")

    def basic(text):
        return f"Basic {base64.b64encode(text.encode()).decode()}"

    plain = f"http://127.0.0.1:{hostile.server_address[1]}/plain"
    monkeypatch.setenv("NETRC", str(tmp_path / "absent"))
    assert authorization(plain) is None
    assert authorization(hostile.url("plain")) == basic("me:hunter-2")
    path = tmp_path / "netrc"
    path.write_text("machine 127.0.0.1 login you password other-3\n")
    monkeypatch.setenv("NETRC", str(path))
    assert authorization(plain) == basic("you:other-3")
    assert authorization(hostile.url("plain")) == basic("me:hunter-2")
    path.write_text("machine 127.0.0.1 password\nnonsense other-3\n")
    with pytest.raises(RewardError, match=r"netrc:\d: not a netrc file$"):
        ask(plain)


def test_what_cannot_be_sent_is_refused(url):
    with pytest.raises(RewardError, match=r"field 'answer' of completion 1 is not JSON but bytes"):
        ask(url + "/lengths", fields={"prompt": ["a", "b"], "answer": ["5", b"6"]})
    with pytest.raises(RewardError, match="rename the data field 'prompts'"):
        RewardServer(url, deadline_s=1, fields=["prompt", "prompts"])
    with pytest.raises(RewardError, match="http:///a: wanted http://HOST"):
        RewardServer("http:///a", deadline_s=1, fields=["prompt"])
    for bad, why in (
        ("http://a:b", "a:b: Invalid port: 'b'"),
        ("http://a:99999", "a:99999: wanted http://HOST or http://HOST:PORT/PATH"),
        ("http://a:-1", "a:-1: wanted http://HOST or http://HOST:PORT/PATH"),
        ("http://me:p/w@h", r"\*\*\*@h: percent-encode user and password"),
    ):
        with pytest.raises(RewardError, match=f"reward server http://{why}$"):
            RewardServer(bad, deadline_s=1, fields=["prompt"])
