"""Our server beside its peers: what a shared context saves, each asked through its own network interface.

Run with `make bench-sharing` (minutes; beside mlx_lm.server), `make bench-peers` (beside vllm-mlx and Rapid-MLX too),
or `python benchmarks/sharing.py [WORKLOAD …] [--rounds N] [--short] [--beside NAME=COMMAND …]`. Such a command serves
OpenAI's chat completions; `{model}` in it stands for the model's folder and `{port}` for where to listen.

Starts all of them as processes of its own and as they come, on one llama that it makes itself (random weights,
float32), with OpenBLAS in front where it is installed, one thread of it. In each round all get the same new texts, one
server after the other; those that are not asked are stopped meanwhile, since some of them poll. A time to first token
is that of a call for one token.

Figures are ratios to the same server's own cold run in the same round, medians over the rounds; the times are there to
tell what the ratios are made of. A goal is met if our ratio is as small as it says and no larger than any other's in
the run. Ends with 1 if one is missed, with 2 if a server fails. `--short` is a tiny model and short texts, without
goals. `--wheel` is a model of 5M parameters with the BLAS that the mlx wheel carries: what is computed counts for more
then, and what a call takes besides for less, as with models and prompts that are larger.

    W1    2500 tokens cold, the same again, and a second turn
    W2    a parent primes 2000 tokens, then 8 children go on with 32 of their own, at once
    W3    8 calls at once with the same 2000 tokens, which nobody primed
    W4    14 agents in turn, 800 tokens in common and 400 of their own: the second turn of each, 16 tokens
    W7    the bytes that W4 leaves in memory / those of the 800 tokens once and of what each agent has for itself;
          for mlx_lm.server by its own log (in GB, with two decimals), and of the agents it still has: 10 by default;
          others do not say
    fork  fork_session on a session of 80 and one of 8000 tokens; list_models is a round trip without it; and what the
          engine itself takes for it, which is to be under 1 ms
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shlex
import signal
import socket
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import mlx.core as mx
from engine import MODEL_25M
from llama import MODEL_5M, Texts, make_folder
from processes import BLAS, Process, ServerFailed, running
from servers import ANSWER_S, MlxLmServer, Ours, Peer, Server
from table import Line, Sample, show
from workloads import SHORT, WORKLOADS, Bench, Sizes, fork


async def measure(
    servers: list[Server], bench: Bench, chosen: list[str], rounds: int
) -> dict[tuple[str, Line], list[Sample]]:
    """Run the workloads on all servers, in turns."""
    samples = defaultdict(list)
    workloads = dict.fromkeys(workload for name, workload in WORKLOADS.items() if name in chosen)
    for server in servers:
        await server.say([("system", bench.texts.text(16)), ("user", bench.texts.text(16))])
        server.process.signal(signal.SIGSTOP)
    for workload in workloads:
        for i in range(1 if workload is fork else rounds):
            for server in servers[:: -1 if i % 2 else 1]:
                random.seed(f"{workload.__name__} {i}")  # the same texts for all
                name, start = server.process.name, time.perf_counter()
                server.process.signal(signal.SIGCONT)
                for line, sample in (await workload(server, bench)).items():
                    samples[name, line].append(sample)
                await server.forget()
                server.process.signal(signal.SIGSTOP)
                took = time.perf_counter() - start
                print(f"{workload.__name__}, round {i + 1}: {name} {took:.1f} s", file=sys.stderr, flush=True)
    return samples


async def run(
    processes: list[Process], addresses: list[str], model: Path, bench: Bench, chosen: list[str], rounds: int
) -> Any:
    """Measure on our server, the first, and on the peers, which listen at these addresses, once they are up.

    Raises:
        ServerFailed: one of them did not do what it should.
    """
    async with httpx2.AsyncClient(timeout=ANSWER_S, limits=httpx2.Limits(max_connections=None)) as http:
        servers: list[Server] = [Ours(processes[0], await Ours.find(processes[0]), http)]
        for process, address in zip(processes[1:], addresses, strict=True):
            kind = MlxLmServer if len(servers) == 1 else Peer
            servers.append(kind(process, await kind.find(process, address, http), model, http))
        return await measure(servers, bench, chosen, rounds)


def free_port() -> int:
    """A port that nobody has at the moment: peers cannot choose one themselves."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def filled(command: str, model: Path, port: int) -> list[str]:
    """A command for this model and port."""
    return [part.format(model=model, port=port) for part in shlex.split(command)]


def main() -> None:
    """Run the workloads named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", choices=[[], *WORKLOADS], default=[])  # [] is what none reads as
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="a tiny model, short texts, one round, no verdict")
    parser.add_argument("--wheel", action="store_true", help="a smaller model, and the BLAS of the wheel")
    parser.add_argument("--beside", action="append", default=[], metavar="NAME=COMMAND", help="one more peer")
    args = parser.parse_args()
    chosen, rounds = args.workloads or list(WORKLOADS), 1 if args.short else args.rounds
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended then, too
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, token_bytes = make_folder(folder / "model", args.short, MODEL_5M if args.wheel else MODEL_25M)
        threads = os.environ["OPENBLAS_NUM_THREADS"]
        blas = f"{BLAS}, threads: {threads}" if BLAS and not args.wheel else "the BLAS of the wheel"
        print(f"{mx.default_device()}, {blas}, mlx-lm {version('mlx-lm')}, rounds: {rounds}", flush=True)
        bench = Bench(Texts(model), SHORT if args.short else Sizes(), token_bytes)
        python = f"{shlex.quote(sys.executable)} -m"
        ours = f"mlx-mcp={python} mlx_mcp serve --standalone --http --port 0 --model {{model}}"
        peers = [f"mlx_lm.server={python} mlx_lm server --port {{port}} --model {{model}}", *args.beside]
        names, commands = zip(*(server.split("=", 1) for server in [ours, *peers]), strict=True)
        ports = [free_port() for _ in names]
        try:
            with ExitStack() as stack:
                processes = [
                    stack.enter_context(running(name, filled(command, model, port), folder, not args.wheel))
                    for name, command, port in zip(names, commands, ports, strict=True)
                ]
                addresses = [f"http://127.0.0.1:{port}" for port in ports[1:]]
                samples = asyncio.run(run(processes, addresses, model, bench, chosen, rounds))
        except ServerFailed as error:
            print(error, file=sys.stderr)
            sys.exit(2)
    if not show(samples, names, chosen, verdict=not args.short):
        sys.exit(1)


if __name__ == "__main__":
    main()
