"""Runs PyTorch's own tests with the compiler alone and with normfx before it, and says where the two differ.

    python tests/peers/run.py FOLDER/test --files dynamo/test_repros.py inductor/test_torchinductor.py --out peers.json

FOLDER is a checkout of PyTorch at the tag of the installed version; docs/peers.md says how to get one, and how to read
the table. Tests run in processes of their own: one that dies or stands still costs only the test it was at.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
STARTING = 900.0
"""Seconds until a process has imported torch and the tests, on a machine that does other things too."""

Result = dict[str, Any]


@dataclass(frozen=True)
class Runner:
    """How processes are started.

    folder: of the tests, from which files are named
    patience: seconds without a line in the results after which a process is ended
    path: further folders to import from, between colons
    """

    folder: Path
    compiler: str
    patience: float
    select: str | None = None
    path: str = ""

    def run(self, tests: Sequence[str], mode: str) -> dict[str, Result]:
        """The result of each test of these files, or of these tests; after a death a new process goes on."""
        done: dict[str, Result] = {}
        left = list(tests)
        while left:
            lines = self._process(left, mode)
            ids = [name for line in lines if line["event"] == "collected" for name in line["ids"]]
            for line in lines:
                if line["event"] == "end" and done.get(line["id"], {}).get("outcome") != "failed":
                    done[line["id"]] = line
            if not ids:
                raise RuntimeError(f"no tests were found in {' '.join(left[:3])}: see the output above")
            started = [line["id"] for line in lines if line["event"] == "start"]
            if started and started[-1] not in done:
                done[started[-1]] = {"id": started[-1], "outcome": "died", "kind": lines[-1]["how"], "text": ""}
            if not started:
                done.update({name: {"id": name, "outcome": "died", "kind": "not started", "text": ""} for name in ids})
            left = [name for name in ids if name not in done]
        return done

    def _process(self, arguments: Sequence[str], mode: str) -> list[Result]:
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder, "results.jsonl")
            Path(folder, "arguments").write_text("\n".join(arguments))
            environ = os.environ | {"PEERS_MODE": mode, "PEERS_COMPILER": self.compiler, "PEERS_RESULTS": str(results)}
            # not the working folder, which may hold a folder named like an installed package
            environ |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{HERE}:{self.path}"}
            environ |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache"}
            command = [sys.executable, "-m", "pytest", "-p", "swap", "-c", os.devnull, "--rootdir", str(self.folder)]
            # this repository's conftest is not for samples.py
            command += ["--confcutdir", str(self.folder)]
            command += ["-q", "-p", "no:cacheprovider", "-W", "ignore", f"@{folder}/arguments"]
            command += ["-k", self.select] if self.select else []
            with open(Path(folder, "output"), "w") as output:
                process = subprocess.Popen(command, cwd=self.folder, env=environ, stdout=output, stderr=output)
                how = self._wait(process, results)
            lines = [json.loads(x) for x in results.read_text().splitlines()] if results.exists() else []
            if not any(line["ids"] for line in lines if line["event"] == "collected"):
                print(Path(folder, "output").read_text()[-2000:], file=sys.stderr)
            return [*lines, {"event": "over", "how": how}]

    def _wait(self, process: subprocess.Popen[bytes], results: Path) -> str:
        size, since = -1, time.monotonic()
        while process.poll() is None:
            now = results.stat().st_size if results.exists() else 0
            if now != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > (self.patience if size > 0 else max(self.patience, STARTING)):
                process.kill()
                process.wait()
                return f"no end after {self.patience:.0f} s"
            time.sleep(0.2)
        return f"exit status {process.returncode}"


def compared(runner: Runner, file: str, mode: str) -> dict[str, Any]:
    """What fails in a mode, and fails again in a new process, while the compiler alone passes it."""
    results = runner.run([file], mode)
    failed = [name for name, result in results.items() if result["outcome"] not in ("passed", "skipped")]
    suspects = [name for name, result in runner.run(failed, "peer").items() if result["outcome"] == "passed"]
    again = runner.run(suspects, mode)
    differing = {name: result for name, result in again.items() if result["outcome"] not in ("passed", "skipped")}
    passing = [result for name, result in {**results, **again}.items() if result["outcome"] == "passed"]
    passed, compiled = len(passing), sum(result["graphs"] > 0 for result in passing)
    text = f"{passed} pass, of which {compiled} compile a graph, {len(differing)} differ from {runner.compiler}"
    print(f"{file}: {mode}: {text}", flush=True)
    for name, result in differing.items():
        print(f"  {name}: {result.get('stage', '')} {result.get('kind', '')}: {result.get('text', '')}", flush=True)
    return {"passed": passed, "compiled": compiled, "differ": differing}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a test passes with the compiler alone and fails with normfx."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="PyTorch's folder `test`")
    parser.add_argument("--files", nargs="+", required=True, help="files of tests, relative to the folder")
    parser.add_argument("--select", help="as pytest's -k")
    parser.add_argument("--modes", nargs="+", default=["normfx", "forced"], choices=["normfx", "forced"])
    parser.add_argument("--compiler", default="inductor", help="or a quicker backend of Dynamo, such as aot_eager")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds that one test may take")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--path", default="", help="further folders to import from")
    parser.add_argument("--out", type=Path, default=Path("peers.json"))
    given = parser.parse_args(arguments)
    runner = Runner(given.folder.resolve(), given.compiler, given.patience, given.select, given.path)
    with ThreadPoolExecutor(given.jobs) as pool:
        pairs = [(file, mode) for file in given.files for mode in given.modes]
        outcomes = list(pool.map(lambda pair: compared(runner, *pair), pairs))
    known = json.loads(given.out.read_text())["results"] if given.out.exists() else []
    fresh = [
        {"file": file, "compiler": given.compiler, "mode": mode, **outcome}
        for (file, mode), outcome in zip(pairs, outcomes, strict=True)
    ]
    keys = {(r["file"], r["compiler"], r["mode"]) for r in fresh}
    results = [r for r in known if (r["file"], r["compiler"], r["mode"]) not in keys] + fresh
    given.out.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=1))
    return int(any(outcome["differ"] for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
