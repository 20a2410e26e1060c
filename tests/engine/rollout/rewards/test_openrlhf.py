"""A server of OpenRLHF's protocol: what it is sent, and what is taken of its reply."""

import http.server
import json
import threading

import pytest

from tests.engine.rollout.rewards.test_sources import completion, context_of
from tests.engine.runs import train
from warpo.engine.config.policy import load_config
from warpo.engine.errors import ConfigError, RewardError
from warpo.engine.rollout.rewards.combine import RewardSources
from warpo.engine.types import Prompt


class Serve(http.server.BaseHTTPRequestHandler):
    """Answers as openrlhf.cli.serve_rm does; the path says how it fails."""

    seen: list = []

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(request)
        rewards = [float(len(text)) for text in request["query"]]
        reply = {"rewards": rewards, "scores": rewards, "extra_logs": {"dummy_scores": rewards}}
        if self.path == "/steps":
            reply["rewards"] = [[[1, 0.5]] for _ in rewards]
        if self.path == "/short":
            reply["rewards"] = rewards[1:]
        if self.path == "/scores":
            del reply["rewards"]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    Serve.seen.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


PROMPTS = [
    Prompt(token_ids=[10, 40], fields={"prompt": "t10 t40", "word": "a"}, prompt_id=1),
    Prompt(token_ids=[11], fields={"prompt": "t11", "word": 7}, prompt_id=2),
]
COMPLETIONS = [completion(20, 21, 1), completion(1)]


def ask(folder, source, **options):
    with RewardSources(context_of(folder, source, **options)) as sources:
        return sources(PROMPTS, COMPLETIONS)


def test_the_request_and_the_reply_are_openrlhfs(folder, url):
    found = ask(folder, f"0.5 * openrlhf:{url}/get_reward", label_field="word")
    assert Serve.seen == [
        {
            "query": ["t10 t40 t20 t21 <eos>", "t11 <eos>"],
            "prompts": ["t10 t40", "t11"],
            "labels": ["a", 7],
        }
    ]
    assert found.by_source == {"openrlhf": [21.0, 9.0]}
    assert (found.totals, found.steps) == ([10.5, 4.5], None)
    ask(folder, f"openrlhf:{url}/get_reward")
    assert Serve.seen[1]["labels"] == ["", ""]


def test_requests_are_split_between_workers(folder, url):
    assert ask(folder, f"openrlhf:{url}/get_reward", workers=2).totals == [21.0, 9.0]
    assert sorted(request["prompts"] for request in Serve.seen) == [["t10 t40"], ["t11"]]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("steps", r"must reply a number for each completion, replied \[\[\[1, 0.5\]\]"),
        ("short", "one for each completion, returned 1"),
        ("scores", r'must reply \{"rewards": \[...\]\}'),
    ],
)
def test_other_replies_are_refused(folder, url, path, message):
    with pytest.raises(RewardError, match=rf"reward server {url}/{path} .*{message}"):
        ask(folder, f"openrlhf:{url}/{path}")


def test_settings_without_effect_are_refused(folder):
    for sources, message in (
        (["math"], "reward.label_field = 'word' has no effect: no source is of the form openrlhf:"),
        (["openrlhf:h"], "'openrlhf:h': wanted openrlhf:http://... or openrlhf:https://"),
    ):
        words = ["--sampler", "transformers", "--reward.label_field", "word", "--reward.sources"]
        with pytest.raises(ConfigError, match=message):
            load_config(folder / "config.yaml", [*words, *sources])
    with pytest.raises(ConfigError, match="label_field = 'answer': data.train has no such field"):
        ask(folder, "openrlhf:http://h", label_field="answer")


def test_a_run_is_rewarded_by_it_and_hides_its_password(folder, url, capfd):
    place = url.removeprefix("http://")
    source = f"openrlhf:http://me:hunter-2@{place}/get_reward"
    words = ("--sampler", "transformers", "--steps", "1", "--reward.label_field", "word")
    rows = train(folder, *words, "--reward.sources", source)
    assert rows[-1]["reward/mean"] > 0
    assert all(len(set(map(len, request.values()))) == 1 for request in Serve.seen)
    queries = Serve.seen[0]
    assert all(map(str.startswith, queries["query"], queries["prompts"]))
    written = [path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()]
    assert "hunter-2" not in "".join(capfd.readouterr())
    assert not any(b"hunter-2" in file for file in written)
