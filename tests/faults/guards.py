"""Every fault, the guard against it, and whether its test fails when the guard is taken out.

    python tests/faults/guards.py try [NAME …]   each guard is taken out of a copy: its test must fail
    python tests/faults/guards.py table          writes docs/faults.md from the table here and from what was tried

Results are kept in tests/faults/tried.json, with a digest of what was tried: what has not changed is not tried again.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parent.parent.parent
TRIED = Path(__file__).with_name("tried.json")
KILLS_TOLD = Path(__file__).with_name("kills.txt")
TABLE = REPO / "docs" / "faults.md"


@dataclass(frozen=True)
class Fault:
    """A fault, what the job does, the guard in words, and how to take it out: `old` becomes `new` in `file`."""

    name: str
    phase: str
    does: str
    guard: str
    file: str
    old: str
    new: str
    test: str


def fault(name: str, phase: str, does: str, guard: str, file: str, old: str, new: str, test: str) -> Fault:
    return Fault(name, phase, does, guard, f"distrain/{file}", old, new, f"tests/{test}")


AGAIN = "75; the next attempt ends with the same bits"
STOPS, KILLS, HANGS, DISKS, OWNERS, DATA, CODES, LINKS = (
    f"faults/test_{name}.py" for name in ("stops", "kills", "hangs", "disks", "owners", "data", "codes", "links")
)
FETCH = "test_fetch.py"

FAULTS = [
    fault("signal while torch is imported", "start", "75, nothing had to be saved",
          "handlers are there before torch is imported", "__main__.py", "        signals.install()\n", "        pass\n",
          f"{STOPS}::test_stop[SIGTERM-start-rank1]"),
    fault("signal in the first step", "first step", f"saved, {AGAIN}",
          "the ranks ask each other before an attempt's first step, and soon after it", "training/trainer.py",
          "    job.next_poll = job.polled_step = first\n", "    job.next_poll = job.polled_step = first + 10**6\n",
          f"{STOPS}::test_stop[SIGUSR1-first step-launcher]"),
    fault("signal to one rank", "train", f"saved, {AGAIN}", "stop flags are summed over the ranks", "distributed/runtime.py",
          "                dist.all_reduce(words, group=self._control)", "                pass",
          f"{STOPS}::test_stop[SIGTERM-train-rank1]"),
    fault("signal to the whole process group", "train", f"saved, {AGAIN}", "workers note signals themselves",
          "signals.py", "    _requested.append(signal.Signals(number).name)", "    sys.exit(1)",
          f"{STOPS}::test_stop[SIGINT-train-group]"),
    fault("signal in a long evaluation", "evaluate", f"evaluation left at once, saved, made up for; {AGAIN}",
          "ranks meet a few times a second while they evaluate", "distributed/runtime.py",
          "        if agreed.stop:\n            raise StopAgreed\n        if any_progress", "        if any_progress",
          f"{STOPS}::test_stop_in_a_long_evaluation"),
    fault("evaluation that a stop cut short", "evaluate", "evaluated in the next attempt",
          "an attempt makes up for an evaluation that was due", "training/trainer.py",
          "    if evaluates and state.evaluated < state.step and _evaluate(job, logs):",
          "    if evaluates and state.loss_steps and _evaluate(job, logs):",
          f"{STOPS}::test_stop_in_a_long_evaluation"),
    fault("signals while a checkpoint is written", "save", f"the save is finished, {AGAIN}",
          "a second signal is noted as the first", "signals.py", "    _requested.append(signal.Signals(number).name)",
          "    _requested.append(signal.Signals(number).name)\n    signal.signal(number, signal.SIG_DFL)",
          f"{STOPS}::test_more_signals_do_not_break_a_save"),
    fault("signal while data does not come", "train", f"saved, {AGAIN}",
          "data is waited for between two steps, by all ranks together", "distributed/runtime.py",
          "        if agreed.stop:\n            raise StopAgreed\n        if any_progress", "        if any_progress",
          f"{STOPS}::test_stop_while_data_does_not_come"),
    fault("a rank killed", "train", AGAIN, "a lost peer is told from a fault of the program", "distributed/rendezvous.py",
          "    return isinstance(error, dist.DistError) or any(name in str(error).lower() for name in names)",
          "    return False", f"{KILLS}::test_a_killed_worker[rank1]"),
    fault("rank 0 killed", "train", AGAIN, "what was logged after the checkpoint is cut back", "training/checkpointing.py",
          "        logs.cut_back(job.run, done, lines)\n", "", f"{KILLS}::test_a_killed_worker[rank0]"),
    fault("the launcher killed", "train", f"workers gone within 5 s; {AGAIN}",
          "the kernel ends a worker with its launcher", "signals.py",
          "    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)\n", "",
          f"{KILLS}::test_a_killed_launcher_takes_its_workers_with_it"),
    fault("checkpoint with a flipped bit", "start", "named, the one before is taken, same bits",
          "digests are checked on load", "runs/checkpoint.py",
          "if xxhash.xxh3_128_hexdigest(files[name]) != digests[name]:", "if False:",
          f"{DISKS}::test_a_damaged_checkpoint[flip]"),
    fault("checkpoint cut short", "start", "named, the one before is taken, same bits",
          "a damaged checkpoint is skipped", "runs/checkpoint.py",
          "        except DataError as error:\n            skipped.append(str(error))",
          "        except DataError:\n            raise", f"{DISKS}::test_a_damaged_checkpoint[truncate]"),
    fault("checkpoint half-written", "start", "named, the one before is taken, same bits",
          "without its digests it is not a checkpoint", "runs/checkpoint.py",
          '        raise DataError(f"{path}: not a complete checkpoint ({error.filename}: {error.strerror})") from error',
          "        raise", f"{DISKS}::test_a_damaged_checkpoint[halve]"),
    fault("every checkpoint damaged", "start", "78, named: it never starts over by itself",
          "nothing readable is an error where there was something", "training/checkpointing.py",
          '        if skipped or mode == "must":', '        if mode == "must":',
          f"{DISKS}::test_nothing_but_damaged_checkpoints"),
    fault("what a killed save has left", "start", "swept", "leftovers are removed by the next attempt", "training/checkpointing.py",
          "        checkpoint.sweep(job.checkpoints)\n", "",
          f"{DISKS}::test_what_a_save_that_was_cut_short_left_is_swept"),
    fault("no space during a save", "save", "told; training goes on, the next save is tried; same bits",
          "a failed save is not the end", "training/checkpointing.py", "            problem = os_error_of(lambda: _write(job, logs, why))",
          "            _write(job, logs, why)", f"{DISKS}::test_no_space_for_a_while"),
    fault("no space for the metrics", "train", "told once; lines are kept and written later; same lines",
          "lines that cannot be written stay in memory", "runs/logs.py", "            os.ftruncate(self._descriptor, before)\n            raise\n",
          "            self._pending.clear()\n            raise\n",
          f"{DISKS}::test_lines_that_find_no_room_are_written_later"),
    fault("no space to the end", "end", "1, told; the next attempt goes on from the last good checkpoint",
          "the last save's failure is the run's", "training/trainer.py",
          "    if problem is not None:\n        raise SaveError(f\"the end",
          "    if False:\n        raise SaveError(f\"the end", f"{DISKS}::test_no_space_to_the_end"),
    fault("checkpoint folder that cannot be written", "save", "told; 1 at the end; nothing lost but the last steps",
          "a failed save is not the end", "training/checkpointing.py", "            problem = os_error_of(lambda: _write(job, logs, why))",
          "            _write(job, logs, why)", f"{DISKS}::test_a_checkpoint_folder_that_cannot_be_written"),
    fault("no space for the log, or nobody who reads it", "all", "training goes on; same bits",
          "what people read may be lost", "__main__.py", "        output.keep_going()\n", "        pass\n",
          f"{DISKS}::test_a_log_that_cannot_be_written[full]"),
    fault("a rank stopped (SIGSTOP)", "train", f"stacks, rank named within the time-out, {AGAIN}",
          "every rank watches its own progress", "distributed/watchdog.py", "                self._expire(limit)", "                pass",
          f"{HANGS}::test_a_stopped_rank[train-23-rank1]"),
    fault("a rank stopped", "evaluate", f"stacks, rank named within the time-out, {AGAIN}",
          "evaluation has a time-out of its own", "training/setup.py", '            "evaluate": limits.eval_seconds,\n', "",
          f"{HANGS}::test_a_stopped_rank[evaluate-14-rank1]"),
    fault("a rank stopped", "save", f"stacks, rank named within the time-out, {AGAIN}",
          "saving has a time-out of its own", "training/setup.py", '            "save": limits.save_seconds,\n', "",
          f"{HANGS}::test_a_stopped_rank[save-20-rank0]"),
    fault("a rank hangs in its own code", "train", f"all stacks, rank named, {AGAIN}",
          "meetings are counted: who has met least is behind", "distributed/watchdog.py",
          "        self._collectives += 1\n        yield  # not left when it fails: then this process still waits\n        self._collectives += 1\n",
          "        yield\n", f"{HANGS}::test_a_rank_that_hangs_in_its_own_code"),
    fault("a process that holds the interpreter", "train", "SIGABRT, stacks, 1", "the launcher watches its processes",
          "launcher/launch.py", "            self._end_hung(now)\n", "",
          f"{HANGS}::test_a_process_that_never_lets_go_of_the_interpreter"),
    fault("a shard that never arrives", "train", "told after the time-out, rank named, 75",
          "a rank says what it waits for", "training/trainer.py", '        rt.watch.waits_for = None if ready else "its data"\n',
          "", f"{HANGS}::test_a_shard_that_never_arrives"),
    fault("a node that never comes", "start", "75, missing ranks named", "all wait for all, with a deadline",
          "distributed/rendezvous.py", "        if time.monotonic() > deadline:\n            missing", "        if False:\n            missing",
          f"{HANGS}::test_a_node_that_never_comes"),
    fault("a stop while the first node never comes", "start", "75 at once", "no wait is left to torch",
          "distributed/rendezvous.py", "            if signals.requested():\n", "            if False:\n",
          f"{HANGS}::test_a_first_node_that_never_comes[True]"),
    fault("a name that nobody knows", "start", "75, the name and the cure", "the name is waited for, with a deadline",
          "launcher/launch.py", "            if now - start > seconds or stops.first:", "            if stops.first:",
          f"{HANGS}::test_a_name_that_nobody_knows"),
    fault("nodes that expect different numbers", "start", "78 at once", "numbers are compared when ranks meet",
          "distributed/rendezvous.py", "    if expected != own:", "    if False:",
          f"{HANGS}::test_nodes_that_expect_different_numbers"),
    fault("a process that does not leave in time", "train", f"ended after the grace, {AGAIN}",
          "the grace has an end", "launcher/launch.py", "            if asked_at is not None and now - asked_at > grace:",
          "            if False:", f"{HANGS}::test_a_process_that_does_not_leave_in_time_is_ended"),
    fault("a second job on the same run", "start", "75, owner named; the first is not disturbed",
          "a run's folder has a lease", "runs/attempts.py",
          "        if not newest or (current and _is_gone(current)) or time.monotonic() - changed_at > STALE_SECONDS:",
          "        if True:", f"{OWNERS}::test_a_second_job_refuses_naming_the_owner"),
    fault("a second job while the first one leaves", "start", "waits, then goes on from what the first one saved",
          "the checkpoint is chosen again after a wait", "training/checkpointing.py",
          "        if checkpoint.steps(job.checkpoints) != seen:", "        if False:",
          f"{OWNERS}::test_a_second_job_waits_for_the_first_to_leave"),
    fault("an owner frozen, and thawed after a takeover", "train", "it leaves with 75 and writes nothing",
          "an owner that sees a newer attempt ends itself", "runs/attempts.py", "        if self._next.exists():", "        if False:",
          f"{OWNERS}::test_an_owner_that_was_frozen_loses_the_run_and_leaves"),
    fault("a shard vanishes", "train", "78, shard named, saved where it ended; restored, same bits",
          "what was trained is saved when data fails", "training/trainer.py", '        _keep(job, logs, "data")\n', "",
          f"{DATA}::test_a_shard_is_harmed[vanish-train]"),
    fault("a shard shrinks", "train", "78, shard named, saved where it ended; restored, same bits",
          "all ranks leave when one cannot read", "distributed/runtime.py",
          "        if any_problem:\n            raise self.first_of_all(problem)\n",
          "        if problem:\n            raise problem\n", f"{DATA}::test_a_shard_is_harmed[shrink-train]"),
    fault("a shard's bytes change", "train", "78, shard named, saved where it ended; restored, same bits",
          "every read is checked against the manifest", "data/shards.py",
          "        if _DIGESTS[digest](data) != getattr(shard, digest):", "        if False:",
          f"{DATA}::test_a_shard_is_harmed[change-train]"),
    fault("a shard changes", "evaluate", "78, shard named, saved where it ended; restored, same bits",
          "all ranks leave an evaluation together", "distributed/runtime.py",
          "        if any_problem:\n            raise self.first_of_all(problem)\n",
          "        if problem:\n            raise problem\n", f"{DATA}::test_a_shard_is_harmed[change-test]"),
    fault("an exception in one rank", "train", "1, shown once: host, phase, step, traceback",
          "workers report to the launcher, which shows the first", "launcher/launch.py",
          "        if end.failure is not None and end.failure.traceback:", "        if False:",
          f"{CODES}::test_a_fault_of_the_program_is_shown_once_with_its_traceback"),
    fault("an exception on another node", "train", "1 on both nodes, and in RUN/exit.json",
          "who fails alone leaves word at the store", "distributed/runtime.py",
          "            self._peer_store.leave(failure_of(error))\n", "            pass\n",
          f"{CODES}::test_a_fault_on_another_node_is_told_on_the_first"),
    fault("a crash (SIGSEGV) on another node", "train", "1 on both nodes, and in RUN/exit.json",
          "its launcher leaves word in RUN/nodes", "launcher/launch.py",
          "        outcome = book.hear(topology.nodes, outcome)\n", "        pass\n",
          f"{CODES}::test_a_crash_on_another_node_is_told_on_the_first"),
    fault("a node that cannot start", "start", "78 on both nodes at once",
          "who waits for all looks for word of who failed", "distributed/rendezvous.py",
          "        peer = peer_store.failed()\n", "        peer = None\n",
          f"{CODES}::test_one_node_that_cannot_start_ends_all[environment]"),
    fault("a data set that one node lacks", "start", "78 on both nodes at once",
          "what can fail on one process is agreed upon", "distributed/runtime.py",
          "        if any(self.agree(problem is not None).flags):\n            raise self.first_of_all(problem)\n",
          "        if problem:\n            raise problem\n",
          f"{CODES}::test_one_node_that_cannot_start_ends_all[data]"),
    fault("a crash (SIGSEGV)", "train", "1", "only signals from outside count as a lost process", "launcher/launch.py",
          "_ENDED_FROM_OUTSIDE = {signal.SIGKILL, *STOP}", "_ENDED_FROM_OUTSIDE = set(signal.Signals)",
          f"{CODES}::test_a_crash_is_a_fault"),
    fault("a job that never gets anywhere", "first step", "75, 75, then 1",
          "attempts without progress are counted in RUN", "launcher/launch.py",
          "        if outcome.code == EXIT_AGAIN and idle >= self._most:", "        if False:",
          f"{CODES}::test_attempts_without_progress_are_bounded"),
    fault("1, 2, 3, 1 and 4 processes in turn", "all", "same ids; fp64 weights within 1e-10 of one process",
          "a rank's loss counts W / G under DDP's mean", "training/step.py",
          "    scale = rt.world.size / config.global_batch_size", "    scale = 2 / config.global_batch_size",
          f"{CODES}::test_any_number_of_processes_goes_on"),
    fault("a link cut between two nodes", "train", f"both nodes: 75 within the time-out; {AGAIN}",
          "every rank watches its own progress", "distributed/watchdog.py", "                self._expire(limit)", "                pass",
          f"{LINKS}::test_a_link_that_is_cut"),
    fault("a server that answers 503 now and then", "data", "tried again after random waits that grow",
          "what may pass is tried again", "data/fetch.py", "stop=tenacity.stop_after_attempt(self._options.retries + 1)",
          "stop=tenacity.stop_after_attempt(1)", f"{FETCH}::test_a_run_from_a_flaky_server_without_a_cache_is_the_local_run"),
    fault("a body cut short, or other bytes", "data", "tried again; never trained on",
          "length and sha256 are checked before anything is kept", "data/fetch.py",
          "            reason = f\"more than the expected {max_bytes} bytes\" if len(data) > max_bytes else check(data)",
          "            reason = None", f"{FETCH}::test_what_may_pass_is_tried_again"),
    fault("a body without end", "data", "given up; bounded in memory and time", "no byte more than promised is read",
          "data/fetch.py", "            while content.tell() <= max_bytes and not abandoned.is_set():\n"
          "                chunk = file.read(min(_CHUNK_BYTES, max_bytes + 1 - content.tell()))\n",
          "            while True:\n                chunk = file.read(_CHUNK_BYTES)\n",
          f"{FETCH}::test_a_body_without_end_takes_neither_memory_nor_time"),
    fault("a server or file system that hangs", "data", "each try has an end", "every try runs beside a clock",
          "data/fetch.py", "                if remaining <= 0:\n                    raise TimeoutError from None\n", "",
          f"{FETCH}::test_a_file_system_that_hangs_and_knows_no_time_out_is_given_up"),
    fault("a server that is gone", "data", "75: another time it may answer", "it is told from data that is wrong",
          "failures.py", "    (UnreachableError, \"peer\", EXIT_AGAIN),\n", "",
          f"{FETCH}::test_a_server_that_dies_ends_the_run_with_one_message"),
    fault("a stop while a fetch hangs", "data", "left behind at once", "waits and fetches see that nobody wants them",
          "data/fetch.py", "        while not stop.is_set():\n            remaining", "        while True:\n            remaining",
          f"{FETCH}::test_closing_does_not_wait_for_the_network"),
    fault("a damaged file in the cache", "data", "fetched again", "what is cached is checked at every read", "data/fetch.py",
          "        intact = data is not None and check(data) is None", "        intact = data is not None",
          f"{FETCH}::test_a_damaged_entry_is_fetched_once_again"),
    fault("a full cache disk", "data", "makes room; without any told once, training goes on",
          "what cannot be kept is used from memory", "data/fetch.py",
          "        except OSError as error:\n            self._warn(f\"{error.strerror}; make room",
          "        except ZeroDivisionError as error:\n            self._warn(f\"{error}; make room",
          f"{FETCH}::test_a_full_disk_makes_room_and_without_any_is_told_once"),
    fault("four processes fill one cache", "data", "bound kept, every byte right", "the place is taken before it is counted",
          "data/fetch.py", "        self._delete(entries, excess)\n        return True", "        return True",
          f"{FETCH}::test_four_processes_share_a_cache"),
]  # fmt: skip

UNGUARDED = """
## A hundred kills

`make faults PART=kills` sends SIGKILL a hundred times to one run of 900 steps on 2 processes: in turns to one worker, all
workers, the launcher alone, everything, and rank 0; each time at an event drawn at random. {kills}

## What was not made to survive

- A fault that neither ends nor stops a process, but computes something else (a bit that flips in memory or on the way to
  the device): nothing here detects it. Digests cover what lies on disk.
- Steps between the last checkpoint and a SIGKILL are trained again, with the same result; their time is lost.
- A full disk does not hold what cannot be written: lines and checkpoints that never found room are lost when the process
  ends, and the next attempt trains those steps again.
- A network file system that shows a new file late (NFS with long attribute caches) lets an owner that lost its lease
  write for so long. Everything else about leases counts on `link` and `rename` being atomic.
- `PR_SET_PDEATHSIG` is Linux; elsewhere a killed launcher leaves its workers behind, and the lease keeps them from harm.
- NCCL was not at hand: what is here was tried on CPUs with gloo.
"""


def table() -> str:
    """docs/faults.md."""
    tried = json.loads(TRIED.read_text()) if TRIED.exists() else {}
    lines = [
        "# Faults", "",
        "What was done to a real job (`distrain launch`, 2 processes or more), and what it did. Nothing was lost in any of",
        "them: each run was then started again and ended with the same weights, bit for bit, the same ids in every step and",
        "the same metrics as one that nothing happened to (where it could go on at all).", "",
        "A fault counts only if its test fails without the guard against it. `make guards` takes each guard out of a copy of",
        "the code and runs the test there. `make faults` runs the tests, and the hundred kills; `make test` a short form.", "",
        "| | fault | phase | what the job does | guard | fails without it |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for number, one in enumerate(FAULTS, 1):
        seen = {digest(one): "yes"}.get(tried.get(key_of(one), ""), "not tried with this code")
        lines.append(f"| {number} | {one.name} | {one.phase} | {one.does} | {one.guard} (`{one.file}`) | {seen} |")
    kills = KILLS_TOLD.read_text().strip() if KILLS_TOLD.exists() else ""
    return "\n".join(lines) + "\n" + UNGUARDED.format(kills=kills)


def key_of(one: Fault) -> str:
    """What a result is kept under."""
    return f"{one.test} without: {one.guard}"


def digest(one: Fault) -> str:
    """Of what was tried: the guard taken out, and the text of the test."""
    file, _, name = one.test.partition("::")
    source = (REPO / file).read_text()
    functions = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    text = next(ast.get_source_segment(source, node) for node in functions if node.name == name.partition("[")[0])
    return hashlib.sha256(f"{one.file}\0{one.old}\0{one.new}\0{text}".encode()).hexdigest()[:16]


def try_one(one: Fault) -> bool:
    """Whether the fault's test fails without the guard."""
    with tempfile.TemporaryDirectory(prefix="distrain-guards-") as folder:
        copy = Path(folder)
        for name in ("distrain", "tests", "configs"):
            shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPO / "pyproject.toml", copy)
        target = copy / one.file
        text = target.read_text()
        assert text.count(one.old) == 1, f"{one.name}: {one.file} holds its guard {text.count(one.old)} times"
        target.write_text(text.replace(one.old, one.new))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--timeout", "240", one.test],
            cwd=copy, env={**os.environ, "PYTHONPATH": folder}, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        if done.returncode == 1 and " failed" in done.stdout:
            return True
        print(done.stdout[-1500:])
        return False


def try_all(names: list[str]) -> int:
    """Try the guards, those named or all that were not tried as they are now."""
    tried = json.loads(TRIED.read_text()) if TRIED.exists() else {}
    missed = 0
    for one in FAULTS:
        key = key_of(one)
        if (names and not any(name in key or name in one.name for name in names)) or (
            not names and tried.get(key) == digest(one)
        ):
            continue
        caught = try_one(one)
        missed += not caught
        print(f"{'fails without it' if caught else 'PASSES WITHOUT IT'}: {key}", flush=True)
        tried.pop(key, None)
        if caught:
            tried[key] = digest(one)
        TRIED.write_text(json.dumps(tried, indent=1) + "\n")
    return missed


if __name__ == "__main__":
    if sys.argv[1:2] == ["try"]:
        sys.exit(try_all(sys.argv[2:]))
    if sys.argv[1:] == ["table"]:
        sys.exit(TABLE.write_text(table()) == 0)
    sys.exit(__doc__)
