"""A Mac is kept awake while calls run, by one child, and sleeps again when none has run for a while."""

import os
import subprocess
import sys
import time

import pytest

from mlx_mcp.process.awake import COMMAND, IDLE_S, KeepAwake, keeps_awake
from tests.process.windows import is_alive, wait_until

STAND_IN = (sys.executable, "-c", "import sys; sys.stdin.read(); import time; time.sleep(60)")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_one_child_lives_while_calls_run_and_for_a_while_after():
    clock = Clock()
    awake = KeepAwake(STAND_IN, clock)
    try:
        awake.look(False)
        assert not awake.awake
        awake.look(True)
        first = awake._child
        assert awake.awake
        assert first.args[-1] == str(os.getpid())
        clock.now += 2 * IDLE_S
        awake.look(True)
        assert awake._child is first
        clock.now += IDLE_S - 1
        awake.look(False)
        assert awake.awake
        clock.now += 1
        awake.look(False)
        assert not awake.awake
        assert not is_alive(first.pid)
    finally:
        awake.end()
    awake.end()


def test_a_child_that_was_killed_is_started_again_by_the_next_call():
    awake = KeepAwake(STAND_IN)
    try:
        awake.look(True)
        first = awake._child
        first.kill()
        wait_until(lambda: not awake.awake)
        awake.look(True)
        assert awake.awake
        assert awake._child is not first
    finally:
        awake.end()


def test_a_machine_without_the_command_serves_all_the_same():
    awake = KeepAwake(("/nowhere/caffeinate",))
    awake.look(True)
    awake.look(True)
    assert not awake.awake


@pytest.mark.parametrize(
    ("wanted", "platform", "kept"),
    [(None, "darwin", True), (True, "darwin", True), (False, "darwin", False), (None, "linux", False)],
)
def test_only_a_mac_is_kept_awake_and_only_if_its_user_does_not_mind(wanted, platform, kept):
    assert keeps_awake(wanted, platform) is kept


def test_macos_is_asked_to_keep_the_system_awake_until_this_process_ends():
    assert COMMAND == ("/usr/bin/caffeinate", "-i", "-w")


def test_the_clock_of_steps_stops_while_the_machine_sleeps():
    # mach_absolute_time and CLOCK_MONOTONIC both stand still then, so that a step over a night's sleep is no hang.
    assert time.get_clock_info("monotonic").implementation in ("mach_absolute_time()", "clock_gettime(CLOCK_MONOTONIC)")
    assert subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True).returncode == 0
