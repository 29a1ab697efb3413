"""What people do with mlx-mcp in Claude Code, in both eras of the protocol, over stdio and HTTP."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

from tests.hosts.conftest import ERAS
from tests.hosts.endpoint import Call, texts
from tests.process.windows import status, wait_until

FACTS = "Alice's badge is 771. Bob's badge is 342. Carol's badge is 109."
BADGES = {"Alice": "771", "Bob": "342", "Carol": "109"}
LONG = {"prompt": "Count from 1 to 99.", "max_tokens": 100, "regex": "[0-9, ]{800}", "temperature": 1.0}
ENDLESS = LONG | {"max_tokens": 1900, "regex": "[0-9, ]{9000}"}
ENDLESS_BATCH = {"prompts": ["Count."] * 8, "max_tokens": 1900, "options": {"regex": "[0-9, ]{9000}"}}
LOOK_S = 0.01


def tool(name, **arguments):
    return Call(f"mcp__mlx__{name}", arguments)


def question(name):
    return f"What is {name}'s badge?"


def told(endpoint):
    """All that the model was told."""
    messages = [message for request in list(endpoint.requests) for message in request["messages"]]
    return "\n".join(text for message in messages for text in texts(message))


def test_it_speaks_the_era_that_is_asked_for(claude, era):
    def models():
        (result,) = yield [tool("list_models")]
        return result.json["models"][0]["name"]

    assert claude.play(models) == "embedded"
    assert f'"negotiatedProtocolVersion":"{ERAS[era]}"' in claude.log()


def test_three_calls_of_one_turn_run_as_one_batch(claude, place):
    def parallel():
        results = yield [tool("generate", **LONG, seed=seed) for seed in range(3)]
        return " ".join(result.json["finish_reason"] for result in results)

    with ThreadPoolExecutor() as thread:
        playing, rows = thread.submit(claude.play, parallel), set()
        while not playing.done():
            rows.add(status(place)["rows"])
            time.sleep(LOOK_S)
    assert playing.result() == "length length length"
    assert max(rows) == 3


def test_three_sub_agents_go_on_from_one_primed_session(claude):
    def main():
        (primed,) = yield [tool("create_session", messages=[{"role": "user", "content": FACTS}])]
        session, tokens = primed.json["session"], primed.json["tokens"]
        (forked,) = yield [tool("fork_session", session=session, count=3)]
        for fork, name in zip(forked.json["sessions"], BADGES, strict=True):
            claude.endpoint.perform(f"agent-{name}", sub_agent(fork, name, tokens))
        answers = yield [
            Call("Agent", {"description": "ask", "prompt": f"PLAY agent-{name}", "run_in_background": False})
            for name in BADGES
        ]
        for answer, (name, badge) in zip(answers, BADGES.items(), strict=True):
            assert f"{name} has {badge}" in answer.text
        (closed,) = yield [tool("close_session", sessions=[session, *forked.json["sessions"]])]
        return str(len(closed.json["closed"]))

    def sub_agent(fork, name, tokens):
        def asks():
            (answer,) = yield [tool("generate", session=fork, prompt=question(name))]
            assert answer.json["cached_tokens"] >= tokens
            return f"{name} has {answer.json['text']}"

        return asks

    assert claude.play(main) == "4"


def test_a_turn_that_the_user_stops_frees_its_row(claude, place):
    def endless():
        yield [tool("generate", **ENDLESS)]

    claude.endpoint.perform("endless", endless)
    claude.say("PLAY endless")
    wait_until(lambda: status(place)["rows"] == 1)
    claude.interrupt()
    wait_until(lambda: status(place)["rows"] == 0)
    assert claude.end_of_turn()["terminal_reason"] == "aborted_tools"


def test_a_long_result_comes_through_a_handle(claude):
    def fetches():
        (began,) = yield [tool("generate", **LONG, seed=1, wait_s=0)]
        assert began.json["status"] == "running"
        (fetched,) = yield [tool("get_result", result_id=began.json["result_id"])]
        (again,) = yield [tool("generate", **LONG, seed=1)]
        assert fetched.json["text"] == again.json["text"]
        return fetched.json["finish_reason"]

    assert claude.play(fetches) == "length"


def test_a_call_that_outlives_the_hosts_time_out_is_fetched_afterwards(impatient):
    def outlives():
        began, cut = yield [tool("generate", **LONG, wait_s=0), tool("generate_batch", **ENDLESS_BATCH)]
        assert cut.is_error
        assert "timed out" in cut.text
        handle = began.json["result_id"]
        (fetched,) = yield [tool("get_result", result_id=handle, wait_s=0.5)]
        while fetched.json.get("status") == "running":
            (fetched,) = yield [tool("get_result", result_id=handle, wait_s=0.5)]
        return fetched.json["finish_reason"]

    assert impatient.play(outlives) == "length"


def test_a_slash_command_puts_our_prompt_before_the_model(claude):
    def delegated():
        (answer,) = yield [tool("generate", prompt=f"{FACTS} {question('Bob')}")]
        return answer.json["text"]

    claude.endpoint.perform("delegated", delegated)
    assert claude.ask("/mcp__mlx__delegate PLAY-delegated") == "342"
    claude.endpoint.raise_what_failed()
    said = told(claude.endpoint)
    assert "Task: PLAY-delegated" in said
    assert "Call `generate(" in said


def test_the_model_reads_a_resource(claude):
    def reads():
        (read,) = yield [Call("ReadMcpResourceTool", {"server": "mlx", "uri": "mlx://models"})]
        (content,) = read.json["contents"]
        return json.loads(content["text"])["models"][0]["name"]

    assert claude.play(reads) == "embedded"


def test_a_resource_that_the_user_mentions_is_put_before_the_model(terminal):
    def mentioned():
        return "Seen."
        yield

    terminal.endpoint.perform("mentioned", mentioned)
    terminal.until(lambda: terminal.offers("mlx:mlx://models"))
    terminal.type("PLAY mentioned with @mlx:mlx://models ")
    terminal.until(lambda: "PLAY mentioned" in told(terminal.endpoint))
    assert '"name":"embedded"' in told(terminal.endpoint)
