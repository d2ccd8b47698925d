"""The engine as people run it: processes, the shipped model, the official client; how it fails to start."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import openai
import pytest
from fake_engine import eventually

START_S = 60
MODEL = "kvpilot-tiny"
IGNORE_EOS = {"ignore_eos": True}


class Engine:
    """A running `kvengine serve`; stdout's first line says where."""

    def __init__(self, *options: str, environ: Mapping[str, str] | None = None) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-m", "kvengine", "serve", "--port", "0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environ or {})},
        )
        killer = threading.Timer(START_S, self.child.kill)
        killer.start()
        assert self.child.stdout is not None
        self.ready = self.child.stdout.readline()
        killer.cancel()
        self.url = self.ready.partition(" on ")[2].partition(": ")[0]

    def core_pid(self) -> int:
        (pid,) = Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children").read_text().split()
        return int(pid)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def stop(self) -> tuple[int, str]:
        """Exit code and what it said on stderr."""
        self.child.terminate()
        _out, err = self.child.communicate(timeout=30)
        return self.child.returncode, err


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    running = Engine("--memory", "64MiB")
    yield running
    assert running.stop() == (0, "")


@pytest.fixture
def client(engine: Engine) -> Iterator[openai.OpenAI]:
    with (
        httpx.Client(trust_env=False) as http,
        openai.OpenAI(
            base_url=f"{engine.url}/v1", api_key="none", http_client=http, max_retries=0, timeout=30
        ) as one,
    ):
        yield one


def refused(*options: str) -> tuple[int, str]:
    """Exit code and stderr of an engine that must not start."""
    done = subprocess.run(
        [sys.executable, "-m", "kvengine", "serve", "--port", "0", *options],
        capture_output=True,
        text=True,
        timeout=START_S,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_the_ready_line_shows_the_memory_plan(engine: Engine) -> None:
    assert engine.ready.startswith(f"kvengine serves {MODEL} on http://127.0.0.1:")
    assert "64.0 MiB of memory = " in engine.ready
    assert "blocks of 16 tokens" in engine.ready


def test_the_official_client_completes(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt='{"name": ', max_tokens=24, temperature=0)
    assert len(answer.choices[0].text) > 0
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 24
    again = client.completions.create(model=MODEL, prompt='{"name": ', max_tokens=24, temperature=0)
    assert again.choices[0].text == answer.choices[0].text


def test_the_official_client_gets_several_choices(client: openai.OpenAI) -> None:
    """Each with a seed of its own, the first with the one that was asked for; the likeliest of several."""
    settings = {"model": MODEL, "prompt": '{"name": ', "max_tokens": 12, "seed": 7, "extra_body": IGNORE_EOS}
    texts = [choice.text for choice in client.completions.create(**settings, n=3).choices]
    assert len(set(texts)) == 3
    assert texts[0] == client.completions.create(**settings).choices[0].text
    best = client.completions.create(**settings, best_of=3)
    assert best.choices[0].text == client.completions.create(**settings, best_of=3).choices[0].text
    assert best.usage is not None
    assert best.usage.completion_tokens == 36


def test_the_official_client_searches_with_beams(client: openai.OpenAI) -> None:
    """Those that come back are the best of all, in order, however many are asked for."""
    search = {"use_beam_search": True, "length_penalty": 0.0, **IGNORE_EOS}
    settings = {"model": MODEL, "prompt": '{"name": ', "max_tokens": 12, "temperature": 0, "best_of": 4}
    answer = client.completions.create(**settings, n=2, extra_body=search)
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) == 2
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 48
    again = client.completions.create(**settings, n=4, extra_body=search)
    assert [choice.text for choice in again.choices][:2] == texts


def test_warm_prompts_are_cached_at_the_start_and_again_on_request(tmp_path: Path) -> None:
    prompts = tmp_path / "warm.jsonl"
    lines = [
        {"prompt": "x" * 100, "pin": True},
        {"messages": [{"role": "user", "content": "hi"}], "tenant": "a"},
    ]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    engine = Engine("--memory", "64MiB", "--warm", str(prompts), "--pinned-share", "0.2")
    assert engine.child.stderr is not None
    assert engine.child.stderr.readline() == "kvengine: 2 of 2 warm prompts are cached\n"
    prompts.write_text("{}")
    engine.child.send_signal(signal.SIGHUP)
    assert "warm.jsonl:1: Value error, give either prompt or messages" in engine.child.stderr.readline()
    prompts.write_text(json.dumps(lines[0]))
    engine.child.send_signal(signal.SIGHUP)
    assert engine.child.stderr.readline() == "kvengine: 1 of 1 warm prompts are cached\n"
    assert engine.stop() == (0, "")


def test_the_official_client_streams_a_completion(client: openai.OpenAI) -> None:
    """Same seed, same text, streamed or not; usage comes last."""
    settings = {"model": MODEL, "prompt": "def f(", "max_tokens": 24, "seed": 7, "top_p": 0.9}
    whole = client.completions.create(**settings)
    chunks = list(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


def test_the_official_client_chats(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=16, seed=3)
    stream = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=16, seed=3, stream=True
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(parts) == whole.choices[0].message.content
    assert whole.choices[0].finish_reason in ("stop", "length")


def test_the_official_client_sees_our_errors(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    with pytest.raises(openai.NotFoundError, match="serves 'kvpilot-tiny'"):
        client.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(openai.BadRequestError, match="maximum context length is 2048"):
        client.completions.create(model=MODEL, prompt="x" * 3000)


def test_many_clients_at_once_get_what_they_would_get_alone(client: openai.OpenAI) -> None:
    """Greedy output does not depend on who else is in the batch."""
    prompts = [f'{{"id": {number}, "items": [' for number in range(6)]

    def ask(prompt: str) -> str:
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=32, temperature=0)
        return answer.choices[0].text

    alone = [ask(prompt) for prompt in prompts]
    together: dict[str, str] = {}
    threads = [threading.Thread(target=lambda p=prompt: together.setdefault(p, ask(p))) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [together[prompt] for prompt in prompts] == alone


def test_the_api_process_never_loads_torch(engine: Engine) -> None:
    """Only the core maps it."""
    assert "libtorch" not in Path(f"/proc/{engine.child.pid}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{engine.core_pid()}/maps").read_text()


def test_a_neighbour_that_takes_memory_makes_a_step_fail_and_not_the_engine() -> None:
    """Oversubscribed by the operator: the long prompt fails with 503, a short one is served."""
    engine = Engine(
        "--memory", "64MiB", "--kv-fraction", "0.5", "--external-memory", "22MiB@0s", "--draft", "none"
    )
    with engine.http() as http:
        response = http.post("/v1/completions", json={"prompt": "x" * 1500, "max_tokens": 4})
        assert response.status_code == 503
        assert "out of device memory" in response.json()["error"]["message"]
        assert http.post("/v1/completions", json={"prompt": "x" * 50}).status_code == 200
    code, said = engine.stop()
    assert code == 0
    assert "neighbour took" in said


def test_a_killed_core_leaves_no_client_hanging() -> None:
    """A stream in flight gets an error event, health says 503, and the server can still be stopped."""
    engine = Engine("--memory", "64MiB", "--draft", "none")
    body = {"prompt": "x", "max_tokens": 2000, "stream": True, "ignore_eos": True}
    with engine.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(engine.core_pid(), signal.SIGKILL)
        last = [line for line in lines if line][-1]
        assert "has stopped" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert http.get("/health").status_code == 503
    assert engine.stop()[0] == 0


def test_a_killed_server_leaves_no_core_behind() -> None:
    engine = Engine("--memory", "64MiB", "--draft", "none")
    core = os.pidfd_open(engine.core_pid())
    engine.child.kill()
    engine.child.communicate(timeout=30)
    assert _ended(core)


def test_a_core_ends_with_its_server_and_not_by_a_signal_to_all() -> None:
    """Ctrl-C, or a service manager's SIGTERM to every process: the server drains, which needs the core."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "kvengine.process", str(theirs.fileno())]
    with ours, theirs, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as core:
        theirs.close()
        numbers = (signal.SIGINT, signal.SIGTERM)
        eventually(lambda: all(_ignored_signals(core.pid) >> (number - 1) & 1 for number in numbers))
        for number in numbers:
            core.send_signal(number)
        ours.close()
        assert core.wait(30) == 0


def _ignored_signals(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("SigIgn:")[2].split()[0], 16)


def _ended(pidfd: int) -> bool:
    """Whether the process ends within half a minute."""
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(30_000))


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--model", "/nowhere"), 1, "/nowhere: no such model directory"),
        (("--memory", "lots"), 2, "'lots' is not a size"),
        (("--memory", "8MiB"), 1, "leave no KV block"),
        (("--external-memory", "64MiB"), 2, "as in 64MiB@10s"),
        (("--kv-fraction", "1.5"), 2, "kv_fraction=1.5: a share"),
        (("--prefill-chunk", "4096"), 2, "lower it or raise --step-tokens"),
        (("--callers", "/nowhere.json"), 2, "callers file /nowhere.json"),
        (("--warm", "/nowhere"), 2, "--warm /nowhere: "),
        (("--no-prefix-cache", "--pinned-share", "0.1"), 2, "there is no prefix cache to pin in"),
        (("--host", "203.0.113.7"), 1, "choose another --host or --port"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(options: tuple[str, ...], code: int, words: str) -> None:
    got, said = refused(*options)
    assert got == code
    assert words in said
    assert said.count("\n") == 1
    assert said.startswith("kvengine: ")


def test_a_model_that_is_no_llama_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    code, said = refused("--model", str(tmp_path))
    assert code == 1
    assert "a gpt2 model" in said
    assert said.count("\n") == 1


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = refused("--port", str(port))
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in said
    assert said.count("\n") == 1


def test_unwritable_link_directories_mean_no_telemetry_and_one_warning(tmp_path: Path) -> None:
    """It serves all the same. A file stands where a directory should be: not even root can write there."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    environ = {
        "KVPILOT_TELEMETRY": str(blocked),
        "KVPILOT_CONTROLS": str(blocked),
        "KVPILOT_ENGINE": "e",
    }
    engine = Engine("--memory", "64MiB", "--draft", "none", environ=environ)
    with engine.http() as http:
        assert http.post("/v1/completions", json={"prompt": "x"}).status_code == 200
    code, said = engine.stop()
    assert code == 0
    assert said.count("without telemetry") == 1
    assert "Traceback" not in said
