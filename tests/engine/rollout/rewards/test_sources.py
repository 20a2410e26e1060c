"""Sources as they are written, what they give together, and reward models."""

import http.server
import json
import pkgutil
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch

from tests.engine.runs import train
from warpo.engine.config.policy import load_config
from warpo.engine.config.reward_kinds import KINDS, read_kind
from warpo.engine.config.reward_sources import parse_sources
from warpo.engine.config.sections import RewardSettings
from warpo.engine.data.prompts import load_prompts
from warpo.engine.errors import ConfigError, RewardError
from warpo.engine.models.files import load_tokenizer
from warpo.engine.rollout.rewards.base import RewardSource, SourceContext, open_source
from warpo.engine.rollout.rewards.combine import RewardSources
from warpo.engine.rollout.rewards.overlong import overlong_penalty
from warpo.engine.types import Completion

SCORES = """
def length(completions): return [len(text) for text in completions]
def halves(completions): return [[(len(t) // 2, 1.0), (len(t), 2.0)] for t in completions]
def no_31(completions): return [1 / ("t31" not in text) for text in completions]
def whole(completions): return [[(len(t), 2.0)] for t in completions]
"""


def context_of(folder, *sources, **options):
    """With the tokenizer of the run in `folder`; `options` are of the context or its settings."""
    given = dict(
        fields=["prompt", "word"],
        prompt="t10 t40 t7",
        tokenizer=load_tokenizer(str(folder / "model")),
        max_new_tokens=8,
        dtype="float32",
        device=torch.device("cpu"),
        token_budget=24,
    )
    settings = {name: options.pop(name) for name in options.keys() - given}
    return SourceContext(settings=RewardSettings(sources=sources, **settings), **(given | options))


@pytest.fixture
def open_sources(folder):
    """RewardSources of the run in `folder`, closed after the test."""
    (folder / "some_scores.py").write_text(SCORES)
    opened = []

    def build(*sources, **options):
        opened.append(RewardSources(context_of(folder, *sources, **options)))
        return opened[-1]

    yield build
    for sources in opened:
        sources.close()


def completion(*ids):
    return Completion.of(ids, [0.0] * len(ids), finished=True, weight_version=0)


@pytest.fixture
def sampled(folder):
    """Two completions of the first prompt, three of the second, of several lengths."""
    prompts = load_prompts(folder / "train.jsonl", load_tokenizer(str(folder / "model")), 8)
    owners = [prompts[0]] * 2 + [prompts[1]] * 3
    completions = [
        completion(10, 11, 12, 13, 1),
        completion(20, 1),
        completion(30, 31, 32, 33, 34, 35, 36, 37),
        completion(40, 41, 42, 43),
        completion(1),
    ]
    return owners, completions


def test_weights_kinds_and_names(tmp_path):
    def parsed(*texts):
        return [(s.name, s.kind.name, s.target, s.weight) for s in parse_sources(texts)]

    assert parsed(" a.b:c ", "0.5*math", "-2 * overlong:16") == [
        ("a.b:c", "function", "a.b:c", 1.0),
        ("math", "math", "", 0.5),
        ("overlong", "overlong", "16", -2.0),
    ]
    assert parsed("1e-1 * https://h/a?b=1*2", "http://h/*") == [
        ("https://h/a?b=***", "http", "https://h/a?b=1*2", 0.1),
        ("http://h/*", "http", "http://h/*", 1.0),
    ]
    assert parsed("HTTP://u:pw@h/a?b=1", "http://h?key=1", "http://h?key=2", "m.n:f") == [
        ("HTTP://***@h/a?b=***", "http", "HTTP://u:pw@h/a?b=1", 1.0),
        ("http://h?key=*** #2", "http", "http://h?key=1", 1.0),
        ("http://h?key=*** #3", "http", "http://h?key=2", 1.0),
        ("m.n:f", "function", "m.n:f", 1.0),
    ]
    assert "pw" not in repr(parse_sources(["http://u:pw@h"]))
    directory = str(tmp_path)
    assert parsed(f"3 * model:{directory}", f"process_model:{directory}") == [
        ("model", "model", directory, 3.0),
        ("process_model", "process_model", directory, 1.0),
    ]


OF_EACH_KIND = {
    "function": "some_scores:length",
    "http": "http://localhost:1/x",
    "openrlhf": "openrlhf:http://localhost:1/get_reward",
    "math": "math",
    "model": "model:rm",
    "process_model": "process_model:rm",
    "overlong": "overlong:4",
}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_opens_what_its_facts_say(folder, sampled, reward_model, name):
    reward_model()
    (folder / "some_scores.py").write_text(SCORES)
    kind, target = read_kind(OF_EACH_KIND[name])
    assert (kind, kind.prefix + target) == (KINDS[name], OF_EACH_KIND[name])
    (found,) = parse_sources([OF_EACH_KIND[name]])
    source = open_source(found, context_of(folder, "math", fields=["prompt", "answer"]))
    try:
        assert isinstance(source, RewardSource)
        # nobody serves that URL, and the verifier takes seconds to load
        if name not in ("http", "openrlhf", "math"):
            (score,) = source.score([sampled[0][0]], [sampled[1][0]], ["t10 t11"]).scores
            assert isinstance(score, list) == (kind.gives_steps == "always")
    finally:
        source.close()
    if kind.row_check:
        pkgutil.resolve_name(kind.row_check)({"prompt": "a", "answer": "4"})
    assert kind.is_checkpoint == (folder / target / "config.json").is_file()


def test_kinds_and_what_workers_import_load_no_models():
    code = (
        "import sys; import warpo.engine.config.reward_sources; "
        "assert not {'httpx', 'asyncio', 'pydantic'} & set(sys.modules); "
        "import warpo.engine.rollout.rewards.function, warpo.engine.rollout.rewards.math_answers; "
        "print(sorted({'torch', 'transformers', 'httpx', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["rewards.exact"], r"'rewards.exact': wanted module:function, http://"),
        (["x * math"], r"'x \* math': the weight 'x' is not a number"),
        (["nan * math"], r"the weight must be finite"),
        (["overlong:0"], r"'overlong:0': wanted overlong:N, N tokens >= 1"),
        (["overlong:-3"], r"wanted overlong:N"),
        (["overlong:" + "9" * 5000], r"wanted overlong:N"),
        (["a b:c"], r"'a b:c': wanted module:function"),
        ([".a:b"], r"wanted module:function"),
        (["a:b:c"], r"wanted module:function"),
        (["http://h/a b"], r"'http://h/a b': a URL has no blanks: percent-encode them"),
        (["model:" + "x" * 5000], r"there is no directory 'xxx"),
        (["http://h", "2 * http://h"], r"names http://h 2 times: give it once"),
        (["model:absent"], r"'model:absent': there is no directory 'absent'"),
        (["math", "2 * math"], r"names math 2 times: give it once, with the sum of the weights"),
        (["process_model:/", "process_model:/tmp"], r"two process reward models, / and /tmp: one"),
    ],
)
def test_malformed_sources_are_refused(texts, message):
    with pytest.raises(ConfigError, match=message):
        parse_sources(texts)


def test_process_supervision_without_a_source_of_steps_is_refused(folder):
    process = ("--algorithm", "grpo_process", "--reward.sources")
    with pytest.raises(
        ConfigError,
        match=r"'grpo_process' learns from .*sources = math, 0.1 \* overlong:2 gives none",
    ):
        load_config(folder / "config.yaml", [*process, "math", "0.1 * overlong:2"])
    load_config(folder / "config.yaml", [*process, "math", "token_rewards:low"])


def test_overlong_is_equation_13_of_dapo():
    """With L_max = 20 and L_cache = 5."""
    wanted = [0.0] * 16 + [-0.2, -0.4, -0.6, -0.8, -1.0, -1.0]
    got = [overlong_penalty(length, max_new_tokens=20, cache=5) for length in range(22)]
    assert got == pytest.approx(wanted)


def test_an_overlong_that_is_longer_than_completions_is_refused(open_sources):
    with pytest.raises(ConfigError, match=r"overlong:9: .*rollout.max_new_tokens = 8"):
        open_sources("overlong:9")


def test_totals_are_weighted_sums(open_sources, sampled):
    rewards = open_sources("0.5 * some_scores:length", "2 * overlong:4")(*sampled)
    # "t10 t11 t12 t13" has 15 characters; the end-of-sequence token has none, but is a token.
    assert rewards.by_source == {
        "some_scores:length": [15.0, 3.0, 31.0, 15.0, 0.0],
        "overlong": [-0.25, 0.0, -1.0, 0.0, 0.0],
    }
    assert rewards.totals == [7.0, 1.5, 13.5, 7.5, 0.0]
    assert (rewards.steps, rewards.notes) == (None, [])


def test_a_sum_that_is_not_finite_is_refused(open_sources, sampled):
    with pytest.raises(RewardError, match="the weighted sum is inf for completion 0: lower the we"):
        open_sources("1e308 * some_scores:length")(*sampled)


def test_completions_that_fail_are_counted(open_sources, sampled):
    rewards = open_sources(
        "some_scores:length", "2 * some_scores:no_31", on_error="zero", workers=2
    )(*sampled)
    assert rewards.totals == [17.0, 5.0, 31.0, 17.0, 2.0]
    assert (rewards.failed, rewards.retries, len(rewards.notes)) == (1, 0, 1)


def test_steps_of_a_function_end_at_tokens_and_count_in_the_total(open_sources, sampled):
    owners, completions = sampled[0][:4], sampled[1][:4]
    rewards = open_sources("3 * some_scores:halves", "some_scores:length")(owners, completions)
    # 7 of "t10 t11 t12 t13" is the end of t11, 1 of "t20" lies within it. The length of the whole
    # counts to the last step.
    assert rewards.steps == [
        [(1, 3.0), (3, 21.0)],
        [(0, 3.0), (0, 9.0)],
        [(3, 3.0), (7, 37.0)],
        [(1, 3.0), (3, 21.0)],
    ]
    assert rewards.totals == [9.0 + 15, 9.0 + 3, 9.0 + 31, 9.0 + 15]
    with pytest.raises(RewardError, match="some_scores:whole scores steps and so does another so"):
        open_sources("some_scores:halves", "some_scores:whole")(owners, completions)


def plain_scores(model, prompt, completion):
    """The score at each token of the completion, by one forward pass of plain transformers."""
    ids = torch.tensor([[*prompt.token_ids, *completion.token_ids]])
    with torch.no_grad():
        scores = model.score(model.model(ids).last_hidden_state)[0, :, 0]
    return scores[len(prompt.token_ids) :].tolist()


def test_a_reward_model_scores_the_last_token(open_sources, sampled, reward_model):
    model = reward_model()
    rewards = open_sources("model:rm")(*sampled)
    wanted = [plain_scores(model, p, c)[-1] for p, c in zip(*sampled, strict=True)]
    assert rewards.totals == pytest.approx(wanted, abs=1e-5)
    assert len(set(rewards.totals)) == 5


def test_a_process_reward_model_scores_the_end_of_each_step(open_sources, sampled, reward_model):
    model = reward_model(step_separator="t31")
    rewards = open_sources("0.5 * process_model:rm")(*sampled)
    plain = [plain_scores(model, p, c) for p, c in zip(*sampled, strict=True)]
    # The steps end with t31, and with the last token that has text.
    ends = [[3], [0], [1, 7], [3], [0]]
    assert [[end for end, _ in steps] for steps in rewards.steps] == ends
    for steps, scores in zip(rewards.steps, plain, strict=True):
        assert [s for _, s in steps] == pytest.approx([0.5 * scores[i] for i, _ in steps], abs=1e-5)
    assert rewards.totals == pytest.approx([sum(s for _, s in row) for row in rewards.steps])


def test_without_separator_each_token_is_a_step(open_sources, sampled, reward_model):
    reward_model(step_separator="")
    rewards = open_sources("process_model:rm")(*sampled)
    ends = [[end for end, _ in steps] for steps in rewards.steps]
    assert ends == [[0, 1, 2, 3], [0], list(range(8)), [0, 1, 2, 3], [0]]


def test_checkpoints_that_cannot_score_are_refused(open_sources, folder, reward_model):
    with pytest.raises(
        ConfigError, match="is not a reward model but Qwen2ForCausalLM: train one with"
    ):
        open_sources("model:model")
    reward_model(labels=2)
    with pytest.raises(ConfigError, match="rm is a classifier of 2 labels"):
        open_sources("model:rm")


def test_a_score_that_is_not_finite_is_refused(open_sources, sampled, folder, reward_model):
    model = reward_model()
    torch.nn.init.constant_(model.score.weight, float("nan"))
    model.save_pretrained(folder / "rm")
    with pytest.raises(RewardError, match=r"reward model rm gave \[nan\] for completion 0"):
        open_sources("model:rm")(*sampled)


def test_what_math_could_not_judge_is_noted(open_sources, sampled, folder):
    tokenizer = load_tokenizer(str(folder / "model"))
    tokenizer.add_tokens([r"\boxed{9^{9^{9}}}", r"\boxed{7}"])
    owners = [replace(prompt, fields={"answer": "7"}) for prompt in sampled[0][:2]]
    sources = open_sources("0.5 * math", deadline_s=1.0, fields=["answer"], tokenizer=tokenizer)
    endless, seven = len(tokenizer) - 2, len(tokenizer) - 1
    rewards = sources(owners, [completion(endless), completion(seven)])
    assert (rewards.by_source, rewards.totals) == ({"math": [0.0, 1.0]}, [0.0, 0.5])
    (note,) = rewards.notes
    assert note.startswith("reward math: completion 0 scores 0, its worker was killed after 1 s")


PICKY = """
def short(completions):
    if any(int(word[1:]) % 4 for text in completions for word in text.split()[:1]):
        raise ValueError("not divisible by 4")
    return [1.0] * len(completions)
"""


class Scores(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"rewards": [2.0] * len(request["completions"])}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_run_logs_the_mean_of_each_source_and_no_password(folder, reward_model, capfd):
    reward_model()
    for name in ("train", "eval"):
        path = folder / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps(row | {"answer": "t7"}) for row in rows))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Scores) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{server.server_port}"
        servers = [f"http://me:hunter-2@{place}/{path}?key=letmein-7" for path in "ab"]
        sources = ["token_rewards:low", "0.1 * model:rm", "math", "2 * overlong:4", *servers]
        (folder / "picky.py").write_text(PICKY)
        scored = ("--reward.on_error", "zero", "--reward.sources", "0 * picky:short", *sources)
        rows = train(folder, "--sampler", "transformers", *scored)
        server.shutdown()
    for row in rows[1:]:
        hidden = [f"http://***@{place}/{path}?key=***" for path in "ab"]
        assert [row[f"reward/{name}"] for name in hidden] == [2.0, 2.0]
        low, model, right, overlong = (
            row[f"reward/{name}"] for name in ("token_rewards:low", "model", "math", "overlong")
        )
        mean = low + 0.1 * model + right + 2 * overlong + 4.0
        assert row["reward/mean"] == pytest.approx(mean)
        if "eval/accuracy" not in row:
            assert row["reward/failed"] > 0
            assert row["reward/failed"] == pytest.approx(12 * (1 - row["reward/picky:short"]))
        assert row["reward/retries"] == 0.0
    written = [path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()]
    shown = "".join(capfd.readouterr())
    assert "12 completions score 0; the first of them, completion " in shown
    assert "picky:short raised ValueError: not divisible by 4" in shown
    for secret in ("hunter-2", "letmein-7"):
        assert secret not in shown
        assert not any(secret.encode() in file for file in written)
