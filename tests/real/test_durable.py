"""Sessions that outlive the process."""

from tests.real.beside import BOUND
from tests.real.product import hosting, serving

SYSTEM = (
    "You keep the log of a lighthouse. On Monday the lamp was cleaned, on Tuesday a ship called Vega passed at noon, "
    "on Wednesday there was fog and the horn sounded for six hours, on Thursday the supply boat brought oil and bread. "
) * 2


async def test_after_persist_and_sigkill_a_session_goes_on_as_mlx_lm_would_and_reads_its_keys_and_values_from_disk(
    float32, reference, tmp_path
):
    settings = {"store_dir": tmp_path / "store", "max_ssd_bytes": 1 << 32}
    with serving(float32, **settings) as product:
        async with hosting(product) as host:
            created = await host.call("create_session", system=SYSTEM, name="log")
            first = await host.generate("Which ship passed?", session="log", max_tokens=16)
            kept = await host.call("persist_session", session="log")
            before = await host.generate("And when was the fog?", session="log", keep=False, max_tokens=16)
            await host.generate("This was never persisted.", session="log", max_tokens=4)
        product.kill()
    with serving(float32, **settings) as product:
        async with hosting(product) as host:
            (listed,) = (await host.call("list_sessions"))["sessions"]
            fork = (await host.call("fork_session", session="log"))["sessions"][0]
            after = await host.generate("And when was the fog?", session="log", max_tokens=16)
            forked = await host.generate("And when was the fog?", session=fork, max_tokens=16)
    chat = [("system", SYSTEM), ("user", "Which ship passed?")]
    assert reference.gap(reference.prompt(*chat), first) <= BOUND, first
    chat += [("assistant", first["text"]), ("user", "And when was the fog?")]
    prompt = reference.prompt(*chat)
    assert (listed["session"], listed["tokens"]) == (created["session"], kept["tokens"])
    assert kept["kept_tokens"] >= kept["tokens"] - 1
    assert after["prompt_tokens"] == len(prompt)
    assert after["restored_tokens"] >= kept["kept_tokens"] - 1, after
    assert after["computed_tokens"] == before["computed_tokens"]
    for answer in (before, after, forked):
        assert reference.gap(prompt, answer) <= BOUND, answer
    assert forked["cached_tokens"] + forked["restored_tokens"] >= kept["kept_tokens"] - 1
