"""Against a real server process: what goes over the wire, retries, deadline, refusals."""

import json
import subprocess
import sys
import time

import pytest

from warpo.engine.errors import RewardError
from warpo.engine.rewards.calls import Calls
from warpo.engine.rewards.http import RewardServer

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
            case "short": self.reply(200, {"rewards": lengths[:-1]})
            case "nan": self.reply(200, {"rewards": [1.0, float("nan")]})
            case "text": self.reply(200, {"rewards": ["good", "bad"]})
            case "scores": self.reply(200, {"scores": lengths})
            case "html":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"<html>")
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
        "completions": ["ab", "cdé"], "prompts": FIELDS["prompt"], "answer": ["5", 6]
    }  # fmt: skip
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


def test_a_server_that_is_not_there_is_told():
    with pytest.raises(
        RewardError, match=r"127.0.0.1:1 gave no .*last: ConnectError: .*connection"
    ):
        ask("http://127.0.0.1:1", deadline_s=0.7)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent", r"/absent answered with status 404: '\{\"detail\": \"no such path\"\}'"),
        (
            "short",
            r"/short must return a list of 2 numbers .*, one for each completion, returned 1",
        ),
        ("nan", r"/nan returned nan for completion 1, 'cdé': rewards must be finite"),
        ("text", r"/text must return .* numbers .*, returned 'good' for completion 0, 'ab'"),
        ("scores", r"/scores must reply \{\"rewards\": \[...\]\}, replied \{'scores': \[2, 3\]\}"),
        ("html", r"/html answered with no JSON: '<html>'"),
    ],
)
def test_nonsense_is_refused_by_url_status_and_item(url, path, message):
    with pytest.raises(RewardError, match=message):
        ask(url + "/" + path)


def test_what_cannot_be_sent_is_refused(url):
    with pytest.raises(RewardError, match=r"field 'answer' of completion 1 is no JSON but bytes"):
        ask(url + "/lengths", fields={"prompt": ["a", "b"], "answer": ["5", b"6"]})
    with pytest.raises(RewardError, match="rename the data field 'prompts'"):
        RewardServer(url, deadline_s=1, fields=["prompt", "prompts"])
    with pytest.raises(RewardError, match="http:///a: wanted http://HOST"):
        RewardServer("http:///a", deadline_s=1, fields=["prompt"])
    with pytest.raises(RewardError, match="http://a:b: Invalid port: 'b'"):
        RewardServer("http://a:b", deadline_s=1, fields=["prompt"])
