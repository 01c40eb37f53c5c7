"""`chatgot serve` as a process, spoken to by OpenAI's own client and by those who mean no good."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatgot.inference.sample import LoadedModel
from chatgot.inference.serve import OTHER_FILES, most_connections
from tests.inference.conftest import COPIED, QUEUE, STREAMS, Server, start

PROMPT = "The night"
LONG = {"prompt": PROMPT, "max_tokens": 4096, "stream": True}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def expected(model: LoadedModel, prompt: str = PROMPT, tokens: int = 40, **settings: Any) -> list[str]:
    """The continuations that `chatgot sample` draws."""
    return [text[len(prompt) :] for text in model.continuations(prompt, tokens, **{"temperature": 1.0, **settings})]


def post(server: Server, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, (bytes, str)) else json.dumps(body)
    return httpx.post(
        f"{server.url}/v1/completions",
        content=content,
        headers={"Content-Type": "application/json", **headers},
        timeout=60,
    )


def until_idle(server: Server) -> None:
    """Wait until nothing is drawn any more."""
    end = time.monotonic() + 60
    while (health := httpx.get(f"{server.url}/health").json())["active"] + health["waiting"]:
        assert time.monotonic() < end, health
        time.sleep(0.05)


def test_models_and_health(client: openai.OpenAI, server: Server) -> None:
    (listed,) = client.models.list().data
    assert (listed.id, listed.object, listed.owned_by) == ("run", "model", "chatgot")
    assert client.models.retrieve("run").id == "run"
    with pytest.raises(openai.NotFoundError, match="there is only 'run'"):
        client.models.retrieve("gpt-4")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "active": 0, "waiting": 0, "streams": STREAMS}


def test_a_completion_is_what_sample_draws(client: openai.OpenAI, server: Server) -> None:
    done = client.completions.create(model="run", prompt=PROMPT, max_tokens=40, seed=5, temperature=0.7)
    (choice,) = done.choices
    assert choice.text == expected(server.model, seed=5, temperature=0.7)[0]
    assert (choice.finish_reason, done.object, done.model) == ("length", "text_completion", "run")
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (9, 40, 49)
    several = client.completions.create(model="run", prompt=PROMPT, max_tokens=40, seed=5, n=3, extra_body={"top_k": 5})
    assert [choice.text for choice in several.choices] == expected(server.model, seed=5, top_k=5, num_samples=3)
    ids = server.model.tokenizer.encode(PROMPT).tolist()
    both = client.completions.create(model="run", prompt=[ids, ids[:3]], max_tokens=9, temperature=0, top_p=0.9)
    assert [choice.text for choice in both.choices] == [
        expected(server.model, prompt, 9, temperature=0.0)[0] for prompt in (PROMPT, PROMPT[:3])
    ]
    echoed = client.completions.create(model="run", prompt=PROMPT, max_tokens=4, seed=2, echo=True)
    assert echoed.choices[0].text == PROMPT + expected(server.model, tokens=4, seed=2)[0]
    free = client.completions.create(model="run", prompt=PROMPT, max_tokens=40)
    again = client.completions.create(model="run", prompt=PROMPT, max_tokens=40, seed=free.seed)  # type: ignore[attr-defined]
    assert again.choices[0].text == free.choices[0].text


def test_a_stream_is_the_same_text_in_pieces(client: openai.OpenAI, server: Server) -> None:
    asked: dict[str, Any] = {"model": "run", "prompt": PROMPT, "max_tokens": 40, "seed": 5, "n": 2, "logprobs": 3}
    whole = client.completions.create(**asked)
    texts, tokens, usage = ["", ""], [[], []], None
    for piece in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in piece.choices:
            texts[choice.index] += choice.text
            assert choice.logprobs is not None
            tokens[choice.index] += choice.logprobs.tokens or []
        usage = piece.usage or usage
    assert texts == [choice.text for choice in whole.choices] == expected(server.model, seed=5, num_samples=2)
    assert usage == whole.usage
    for choice, streamed in zip(whole.choices, tokens):
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.tokens == streamed == list(choice.text)  # a character each
        assert logprobs.text_offset == list(range(40))
        assert logprobs.top_logprobs is not None
        assert logprobs.token_logprobs is not None
        for token, value, top in zip(streamed, logprobs.token_logprobs, logprobs.top_logprobs):
            assert len(top) == 3
            assert top.get(token, value) == value <= 0


def test_stop_texts_end_it_and_are_left_out(client: openai.OpenAI, server: Server) -> None:
    (free,) = expected(server.model, tokens=200, seed=1)
    stop = free[20:23]
    before = free[: free.index(stop)]
    asked: dict[str, Any] = {"model": "run", "prompt": PROMPT, "max_tokens": 200, "seed": 1, "stop": ["§§", stop]}
    (choice,) = client.completions.create(**asked, logprobs=0).choices
    assert (choice.text, choice.finish_reason) == (before, "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == list(before)
    pieces = [piece.choices[0] for piece in client.completions.create(**asked, stream=True)]
    assert "".join(piece.text for piece in pieces) == before
    assert [piece.finish_reason for piece in pieces][-2:] == [None, "stop"]


def test_copies_of_the_training_text_are_told_with_their_place(client: openai.OpenAI, server: Server) -> None:
    passage = server.text[100:150]
    answer = httpx.post(f"{server.url}/v1/copied", json={"text": f"§ {passage} §"}).json()
    (copy,) = answer["copies"]
    assert (answer["min_characters"], copy["begin"], copy["end"], copy["count"]) == (COPIED, 1, 52, 1)
    line = server.text[:100].count("\n") + 1
    assert copy["where"].startswith(f"stands in text.txt:{line}, ")
    (place,) = copy["places"]
    assert (place["file"], place["line"]) == ("text.txt", line)
    assert httpx.post(f"{server.url}/v1/copied", json={"text": "nothing of it " * 9}).json()["copies"] == []
    assert httpx.post(f"{server.url}/v1/copied", json={"txt": passage}).status_code == 400

    def goes_on(end: int) -> bool:  # as the training text does
        prompt = server.text[end - 40 : end]
        return expected(server.model, prompt, 1, temperature=0.0)[0] == server.text[end]

    end = next(end for end in range(40, 2000) if goes_on(end))
    asked: dict[str, Any] = {"prompt": server.text[end - 40 : end], "temperature": 0, "max_tokens": 1}
    asked["extra_body"] = {"mark_copied": True}
    (choice,) = client.completions.create(model="run", **asked).model_dump()["choices"]
    (copy,) = choice["copied"]
    assert (copy["begin"], copy["end"]) == (-40, 1)
    *_, last = client.completions.create(model="run", **asked, stream=True)
    assert last.model_dump()["choices"][0]["copied"] == [copy]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "JSON"),
        (b"[]", 400, "object"),
        ({}, 400, "prompt"),
        ({"prompt": ""}, 400, "empty"),
        ({"prompt": []}, 400, "empty"),
        ({"prompt": "Ω"}, 400, "U+03A9"),
        ({"prompt": [10**9]}, 400, "does not exist"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens = 0"),
        ({"prompt": "a", "max_tokens": 10**6}, 400, "at most 4096"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature = -1"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p"),
        ({"prompt": "a", "seed": 2**64}, 400, "seed"),
        ({"prompt": "a", "stop": ""}, 400, "stop"),
        ({"prompt": "a", "logprobs": 21}, 400, "logprobs"),
        ({"prompt": "a", "temprature": 1}, 400, "temprature"),
        ({"prompt": "a", "presence_penalty": 1}, 400, "not supported"),
        ({"prompt": "a", "suffix": "b"}, 400, "not supported"),
        ({"prompt": "a", "best_of": 3}, 400, "best_of"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, 400, "echo"),
        ({"prompt": "a", "n": 11}, 400, "at most 10"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "only 'run'"),
        ({"prompt": "a" * (1 << 20)}, 413, "bytes"),
    ],
)
def test_a_wrong_request_is_refused_with_what_is_allowed(server: Server, body: Any, status: int, says: str) -> None:
    answer = post(server, body)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"]
    assert len(answer.text) < 1000


def test_other_sites_and_other_names_are_kept_out(server: Server) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    port = server.url.rpartition(":")[2]
    for headers, status in [
        ({"Host": "evil.example"}, 403),
        ({"Host": f"evil.example:{port}"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Origin": server.url, "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}, 200),
        ({"Host": f"[::1]:{port}"}, 200),
    ]:
        answer = post(server, body, **headers)
        assert answer.status_code == status, (headers, answer.text)
        assert not [name for name in answer.headers if name.startswith("access-control")]
    asked_first = httpx.options(f"{server.url}/v1/completions", headers={"Origin": server.url})
    assert asked_first.status_code == 405
    page = httpx.get(server.url)
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert httpx.get(server.url, headers={"Host": "evil.example"}).status_code == 403
    assert httpx.get(f"{server.url}/elsewhere").status_code == 404


def streaming(server: Server, seed: int) -> httpx.Response:
    """The beginning of a long stream; close it to go away."""
    body = {**LONG, "seed": seed}
    client = httpx.Client(timeout=60)
    answer = client.send(client.build_request("POST", f"{server.url}/v1/completions", json=body), stream=True)
    answer.extensions["client"] = client
    return answer


def leave(answer: httpx.Response) -> None:
    answer.close()
    answer.extensions["client"].close()


def test_a_full_queue_answers_429_and_who_goes_away_makes_room(client: openai.OpenAI, server: Server) -> None:
    until_idle(server)
    opened = [streaming(server, seed) for seed in range(STREAMS + QUEUE)]
    assert {answer.status_code for answer in opened} == {200}
    with pytest.raises(openai.RateLimitError, match="waiting already"):
        client.completions.create(model="run", prompt=PROMPT, max_tokens=1)
    for answer in opened:
        leave(answer)
    until_idle(server)
    with pytest.raises(httpx.ReadTimeout):  # gone while it waits for a whole answer
        httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 4096}, timeout=0.3)
    until_idle(server)
    assert client.completions.create(model="run", prompt=PROMPT, max_tokens=1, seed=0).choices[0].text


@pytest.mark.parametrize("stream", [True, False])
def test_who_is_gone_at_once_leaves_nothing_running(server: Server, stream: bool) -> None:
    body = json.dumps({**LONG, "stream": stream}).encode()
    port = int(server.url.rpartition(":")[2])
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: "
    for _ in range(40):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head.encode() + b"%d\r\n\r\n" % len(body) + body)
    with socket.create_connection(("127.0.0.1", port)) as connection:  # and one in the middle of its body
        connection.sendall(head.encode() + b"%d\r\n\r\n" % len(body) + body[:5])
    until_idle(server)
    assert post(server, {"prompt": PROMPT, "max_tokens": 1}).status_code == 200


def test_idle_connections_cannot_take_all_files(server: Server) -> None:
    until_idle(server)
    port, most = int(server.url.rpartition(":")[2]), most_connections(STREAMS + QUEUE)
    with contextlib.ExitStack() as opened:
        streams = [streaming(server, seed) for seed in range(STREAMS - 1)]
        for number in range(3 * most):
            idle = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
            idle.sendall((b"", b"POST /v1/compl", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")[number % 3])
        end = time.monotonic() + 60
        while taken(server.process.pid)[1] > most + OTHER_FILES:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert post(server, {"prompt": PROMPT, "max_tokens": 1}).status_code == 200  # an ordinary client comes in
        for answer in streams:  # those that wait for an answer were not thrown out
            assert next(answer.iter_text())
            leave(answer)
    until_idle(server)


def until_health(url: str, status: int) -> None:
    """Wait for this answer; a connection that is refused can end before its answer is read."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}health", timeout=60).status_code == status:
                return
        time.sleep(0.1)
    raise AssertionError(f"no {status} within a minute")


def test_connections_that_all_wait_for_answers_leave_no_room(served_run: Path) -> None:
    process, url = start(served_run, "--streams", "1", "--queue", "1")
    port, most = int(url.rstrip("/").rpartition(":")[2]), most_connections(2)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: 9\r\n\r\n"
    with process, contextlib.ExitStack() as opened:
        for _ in range(most):  # a request whose body does not come
            opened.enter_context(socket.create_connection(("127.0.0.1", port))).sendall(head)
        until_health(url, 503)
        opened.close()
        until_health(url, 200)
        process.terminate()
        assert process.wait(60) == 0


def load(server: Server, clients: int, go_on: Callable[[int], bool]) -> dict[str, int]:
    """Many clients at once, a third of whose requests are broken off in the middle; what came of them.

    Every complete stream is compared with the text that is drawn for its prompt and seed alone.
    """
    came = {"whole": 0, "left": 0, "429": 0}
    texts = {seed: expected(server.model, tokens=60, seed=seed)[0] for seed in range(20)}
    lock = threading.Lock()

    def work(number: int) -> None:
        choose, turn = random.Random(number), 0
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            while go_on(turn):
                turn += 1
                seed, leaves = choose.randrange(20), choose.random() < 1 / 3
                try:
                    with client.completions.create(
                        model="run", prompt=PROMPT, max_tokens=60, seed=seed, stream=True
                    ) as stream:
                        text = ""
                        for count, piece in enumerate(stream):
                            text += piece.choices[0].text
                            if leaves and count == choose.randint(1, 30):
                                break
                except openai.RateLimitError:
                    outcome = "429"
                    time.sleep(0.2)
                else:
                    assert text == texts[seed] if not leaves else texts[seed].startswith(text)
                    outcome = "left" if leaves else "whole"
                with lock:
                    came[outcome] += 1

    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(work, number) for number in range(clients)]:
            done.result()
    return came


def test_streams_of_many_clients_are_never_mixed(server: Server) -> None:
    came = load(server, 14, lambda turn: turn < 3)
    assert came["whole"] > 0
    until_idle(server)


def taken(pid: int) -> tuple[int, int, int]:
    """Threads, open files and resident KiB of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["Threads"]), len(os.listdir(f"/proc/{pid}/fd")), int(status["VmRSS"].split()[0])


@pytest.mark.slow
def test_two_minutes_of_32_clients_leave_nothing_behind(server: Server) -> None:
    load(server, 32, lambda turn: turn < 3)
    until_idle(server)
    before, end = taken(server.process.pid), time.monotonic() + 120
    came = load(server, 32, lambda _: time.monotonic() < end)
    until_idle(server)
    time.sleep(31)  # connections that are kept alive end
    after = taken(server.process.pid)
    print(came, "threads, files, KiB", before, after)
    assert min(came.values()) > 20, came
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    assert after[2] - before[2] < 20_000


raw = st.binary(max_size=40)
odd = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([PROMPT, "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
plausible = st.fixed_dictionaries(
    {"prompt": st.sampled_from([PROMPT, [1, 2], ["T", "The"], [[1], [2]]]) | odd},
    optional={
        "max_tokens": st.integers(-1, 5) | odd,
        "temperature": st.floats(0, 2) | odd,
        "top_k": st.integers(-1, 5) | odd,
        "top_p": st.floats(0, 1) | odd,
        "n": st.integers(0, 3) | odd,
        "seed": st.integers() | odd,
        "stop": st.sampled_from(["a", ["e", " "]]) | odd,
        "stream": st.booleans() | odd,
        "stream_options": st.sampled_from([{"include_usage": True}, {"x": 1}]) | odd,
        "logprobs": st.integers(-1, 25) | odd,
        "echo": st.booleans() | odd,
        "logit_bias": odd,
        "model": st.just("run") | odd,
    },
)
valid = st.fixed_dictionaries(
    {"prompt": st.sampled_from([PROMPT, [1, 2], ["T", "The"], [[1], [2]]]), "max_tokens": st.integers(1, 5)},
    optional={
        "temperature": st.floats(0, 2),
        "top_k": st.none() | st.integers(1, 5),
        "top_p": st.none() | st.floats(0.1, 1),
        "n": st.integers(1, 3),
        "seed": st.none() | st.integers(-(2**63), 2**63 - 1),
        "stop": st.sampled_from(["a", ["e", " "], None]),
        "stream": st.booleans(),
        "stream_options": st.just({"include_usage": True}),
        "logprobs": st.none() | st.integers(0, 20),
        "logit_bias": st.just({}),
        "model": st.just("run"),
        "user": st.text(max_size=5),
    },
)
spoiled = st.tuples(valid, st.sampled_from(["prompt", "max_tokens", "n", "seed", "stop", "logprobs", "x"]), odd).map(
    lambda made: {**made[0], made[1]: made[2]}
)
cut = st.tuples(valid.map(json.dumps), st.integers(0, 60)).map(lambda made: made[0][: made[1]])
bad = spoiled.map(json.dumps) | cut | plausible.map(json.dumps) | odd.map(json.dumps) | raw
requests = st.integers(0, 9).flatmap(lambda number: bad if number < 4 else valid.map(json.dumps))


def fuzz(server: Server, examples: int) -> list[int]:
    """The statuses that as many requests got."""
    statuses: list[int] = []
    with httpx.Client(timeout=60) as http:

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )
        @given(requests)
        def ask(body: str | bytes) -> None:
            url, headers = f"{server.url}/v1/completions", {"Content-Type": "application/json"}
            answer = http.post(url, content=body, headers=headers)
            assert answer.status_code == 200 or 400 <= answer.status_code < 500, (body, answer.text)
            assert '"server_error"' not in answer.text, (body, answer.text)
            statuses.append(answer.status_code)

        ask()
    until_idle(server)
    return statuses


def test_odd_requests_never_break_the_server(server: Server) -> None:
    statuses = fuzz(server, 120)
    assert {200, 400} <= set(statuses)


@pytest.mark.slow
def test_5000_odd_requests_never_break_the_server(server: Server) -> None:
    statuses = fuzz(server, 5000)
    print({status: statuses.count(status) for status in set(statuses)})
    assert {200, 400} <= set(statuses)
    assert statuses.count(200) >= len(statuses) / 3


def test_another_host_wants_the_token_and_ctrl_c_ends_it(served_run: Path) -> None:
    process, url = start(served_run, "--host", "0.0.0.0", CHATGOT_TOKEN="open-sesame")
    with process:
        assert url.endswith("/#token=open-sesame")
        here = f"http://127.0.0.1:{url.partition('/#')[0].rpartition(':')[2]}"
        assert httpx.get(here).status_code == 200  # the page, which holds nothing secret
        assert httpx.get(f"{here}/v1/models").status_code == 401
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{here}/v1", api_key="wrong", max_retries=0).models.list()
        with openai.OpenAI(base_url=f"{here}/v1", api_key="open-sesame", max_retries=0) as client:
            assert client.completions.create(model="run", prompt=PROMPT, max_tokens=2).choices[0].text
        headers = {"Authorization": "Bearer open-sesame", "Host": "evil.example"}
        assert httpx.get(f"{here}/v1/models", headers=headers).status_code == 403
        left = httpx.stream(
            "POST", f"{here}/v1/completions", json=LONG, headers={**headers, "Host": "127.0.0.1"}, timeout=60
        )
        with left as answer:
            assert next(answer.iter_text())
            process.send_signal(signal.SIGINT)  # also in the middle of a stream
            assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--host", "256.1.1.1"], 6, "cannot be listened on"),
        (["--port", "70000"], 2, "65535"),
        (["--max_seconds", "0"], 2, "above 0"),
    ],
)
def test_what_cannot_be_served_is_refused(
    served_run: Path, arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from chatgot import cli

    with pytest.raises(SystemExit) as end:
        cli.main(["serve", str(served_run), *arguments])
    assert end.value.code == code
    assert says in capsys.readouterr().err


def test_a_port_in_use_is_named(server: Server, served_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from chatgot import cli

    with pytest.raises(SystemExit) as end:
        cli.main(["serve", str(served_run), "--port", server.url.rpartition(":")[2]])
    assert end.value.code == 6
    assert "in use" in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    program = "import sys; from chatgot.cli import main; sys.argv[1:] = ['serve', '--help']\n"
    program += "try: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--streams" in done.stdout
    assert done.stdout.endswith("False\n")
