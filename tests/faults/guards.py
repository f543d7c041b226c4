"""Every fault, the guard against it, and whether its test fails without the guard.

    python tests/faults/guards.py try [NAME …]   remove each guard from a copy of the code: its test must fail there
    python tests/faults/guards.py table          write docs/faults.md from this table and the results

A guard is a statement of the code with a trailing comment `# guard: MARKER` (see `markers.py`).
Results are stored in tests/faults/tried.json with a digest of the guard and its test; unchanged guards are not tried
again.
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

from markers import ALWAYS, DROP, NEVER, Marked, Removal, condition, find, replace

REPO = Path(__file__).parent.parent.parent
TRIED = Path(__file__).with_name("tried.json")
KILLS = Path(__file__).with_name("kills.txt")
TABLE = REPO / "docs" / "faults.md"


@dataclass(frozen=True)
class Fault:
    """A fault and the guard against it.

    Attributes:
        name: the fault.
        phase: where it happens.
        outcome: what the job does.
        guard: the guard, in words.
        marker: marker of the guard's statement.
        removal: how the guard is removed.
        test: the test that fails without it.
    """

    name: str
    phase: str
    outcome: str
    guard: str
    marker: str
    removal: Removal
    test: str

    @property
    def key(self) -> str:
        """Key of the result in tried.json."""
        return f"{self.test} without: {self.guard}"


AGAIN = "75; the next attempt ends with the same bits"
SHARD = "78, the shard is named, everything trained is saved; with the shard restored, the same bits"
STOPS, KILLED, HANGS, DISKS, OWNERS, DATA, CODES, LINKS = (
    f"tests/faults/test_{name}.py" for name in ("stops", "kills", "hangs", "disks", "owners", "data", "codes", "links")
)
FETCH, RANGES, LOSSES, RENDEZVOUS = (
    "tests/test_fetch.py",
    "tests/test_ranges.py",
    "tests/test_losses.py",
    "tests/test_rendezvous.py",
)
FILES, WATCHDOG = "tests/test_run_files.py", "tests/test_watchdog.py"
SAVES, MIRROR = "tests/test_saves.py", "tests/test_mirror.py"
RESTARTS, AGREEMENT, STANDBY = "tests/faults/test_restarts.py", "tests/test_agreement.py", "tests/test_standby.py"

FAULTS = [
    Fault("signal while torch is imported", "start", "75, nothing had to be saved",
          "handlers are installed before torch is imported", "early-handlers", DROP,
          f"{STOPS}::test_stop[SIGTERM-start-rank1]"),
    Fault("signal in the first step", "first step", f"a checkpoint, {AGAIN}",
          "the ranks agree on stopping before an attempt's first step, and soon after it", "early-agreement",
          replace("self._next = self._last_step = step + 10**6"),
          f"{STOPS}::test_stop[SIGUSR1-first step-launcher]"),
    Fault("signal to one rank", "train", f"a checkpoint, {AGAIN}", "stop flags are summed over the ranks",
          "sum-of-flags", DROP, f"{STOPS}::test_stop[SIGTERM-train-rank1]"),
    Fault("signal to the whole process group", "train", f"a checkpoint, {AGAIN}", "workers record signals themselves",
          "note-signal", replace("sys.exit(1)"), f"{STOPS}::test_stop[SIGINT-train-group]"),
    Fault("signal in a long evaluation", "evaluate",
          f"the evaluation ends at once, a checkpoint; {AGAIN}, evaluation included",
          "the ranks agree on stopping a few times a second while they evaluate", "stop-while-busy", NEVER,
          f"{STOPS}::test_stop_in_a_long_evaluation"),
    Fault("evaluation that a stop ended early", "evaluate", "the next attempt evaluates again",
          "an attempt begins with the evaluation that was due", "evaluation-due",
          condition("evaluate and self.checkpointer.saved_step != step and self._evaluate()"),
          f"{STOPS}::test_stop_in_a_long_evaluation"),
    Fault("signals while a checkpoint is written", "save", f"the checkpoint is completed, {AGAIN}",
          "later signals are recorded like the first one", "note-signal",
          replace("_requested.append(signal.Signals(number).name)\nsignal.signal(number, signal.SIG_DFL)"),
          f"{STOPS}::test_more_signals_do_not_break_a_save"),
    Fault("signal while the ranks wait for data", "train", f"a checkpoint, {AGAIN}",
          "all ranks wait together, between two steps, and agree on stopping meanwhile", "stop-while-busy", NEVER,
          f"{STOPS}::test_stop_while_data_does_not_arrive"),
    Fault("a rank killed", "train", AGAIN, "the loss of a peer is distinguished from a fault of the program",
          "lost-peer", replace("return"), f"{KILLED}::test_a_killed_worker[rank1]"),
    Fault("rank 0 killed", "train", AGAIN, "lines logged after the checkpoint are cut back", "cut-back-logs", DROP,
          f"{KILLED}::test_a_killed_worker[rank0]"),
    Fault("the launcher killed", "train", f"workers gone within 5 s; {AGAIN}",
          "the kernel kills a worker when its launcher ends", "end-with-launcher", DROP,
          f"{KILLED}::test_a_killed_launcher_takes_its_workers_with_it"),
    Fault("checkpoint with a flipped bit", "start", "it is named, the run resumes from the one before, same bits",
          "digests are checked on load", "digest-of-checkpoint", NEVER, f"{DISKS}::test_a_damaged_checkpoint[flip]"),
    Fault("truncated checkpoint", "start", "it is named, the run resumes from the one before, same bits",
          "a damaged checkpoint is skipped", "skip-damaged-checkpoint", replace("raise"),
          f"{DISKS}::test_a_damaged_checkpoint[truncate]"),
    Fault("half-written checkpoint", "start", "it is named, the run resumes from the one before, same bits",
          "a checkpoint without digests counts as damaged", "halved", replace("raise"),
          f"{DISKS}::test_a_damaged_checkpoint[halve]"),
    Fault("every checkpoint damaged", "start", "78, named: a run never restarts from step 0 by itself",
          "if no checkpoint is readable, the run ends with an error", "no-silent-restart", NEVER,
          f"{DISKS}::test_nothing_but_damaged_checkpoints"),
    Fault("leftovers of a save that was killed", "start", "removed", "each attempt removes them first",
          "sweep-partial-saves", DROP, f"{DISKS}::test_leftovers_of_an_interrupted_save_are_removed"),
    Fault("no space during a save", "save", "a warning; training continues, the next save is tried; same bits",
          "a failed save does not end the run", "failed-save", replace("error = save.result() if save is not None else None"),
          f"{DISKS}::test_no_space_for_a_while"),
    Fault("a process fails while rank 0 writes a checkpoint", "train",
          "the checkpoint is completed first; then the job ends as it would without one",
          "rank 0 waits for its thread before it gives the folder up", "completes-pending-save", DROP,
          f"{SAVES}::test_an_error_waits_for_the_pending_checkpoint"),
    Fault("a disk that does not answer while a checkpoint is written", "train", "75 after the time-out, the checkpoint is named",
          "the thread that writes has a time-out of its own", "save-expires", DROP,
          f"{SAVES}::test_a_checkpoint_that_is_not_written_in_time_ends_the_process"),
    Fault("the run is taken over while a checkpoint is written", "train", "75, and the checkpoint is not committed",
          "the thread looks at the lease before it renames the folder", "checked-before-commit", DROP,
          f"{SAVES}::test_a_job_that_lost_its_folder_does_not_commit_the_pending_checkpoint"),
    Fault("no space for the metrics", "train", "one warning; the lines are written later; same lines",
          "lines that cannot be written stay in memory", "lines-stay-in-memory",
          replace("self._pending.clear()\nraise"), f"{DISKS}::test_lines_without_space_are_written_later"),
    Fault("no space to the end", "end", "1, with the reason; the next attempt resumes from the last good checkpoint",
          "a run whose last save failed has failed", "save-error-at-end", NEVER, f"{DISKS}::test_no_space_to_the_end"),
    Fault("checkpoint folder that cannot be written", "save",
          "a warning; 1 at the end; only the steps since the last checkpoint are lost",
          "a failed save does not end the run", "failed-save", replace("error = save.result() if save is not None else None"),
          f"{DISKS}::test_a_checkpoint_folder_that_cannot_be_written"),
    Fault("no space for the log, or its reader has exited", "all", "training continues; same bits",
          "output that cannot be written is dropped", "tolerant-output", DROP,
          f"{DISKS}::test_a_log_that_cannot_be_written[full]"),
    Fault("a rank stopped (SIGSTOP)", "train", f"stack traces, the rank is named within the time-out, {AGAIN}",
          "every rank has a watchdog", "watchdog-expires", DROP, f"{HANGS}::test_a_stopped_rank[train-23-rank1]"),
    Fault("a rank stopped", "evaluate", f"stack traces, the rank is named within the time-out, {AGAIN}",
          "evaluation has a time-out of its own", "time-outs",
          replace('limits = config.timeouts.model_copy(update={"eval_seconds": 0.0})'),
          f"{HANGS}::test_a_stopped_rank[evaluate-14-rank1]"),
    Fault("a rank stopped", "save", f"stack traces, the rank is named within the time-out, {AGAIN}",
          "saving has a time-out of its own", "time-outs",
          replace('limits = config.timeouts.model_copy(update={"save_seconds": 0.0})'),
          f"{HANGS}::test_a_stopped_rank[save-20-rank0]"),
    Fault("a rank hangs in its own code", "train", f"all stack traces, the rank is named, {AGAIN}",
          "collectives are counted: the rank that entered the fewest is behind", "count-collectives", DROP,
          f"{HANGS}::test_a_rank_that_hangs_in_its_own_code"),
    Fault("a process that never releases the interpreter lock", "train", "SIGABRT, stack traces, 1",
          "the launcher watches the heartbeats of its workers", "abort-hung-worker", DROP,
          f"{HANGS}::test_a_process_that_never_releases_the_interpreter_lock"),
    Fault("the only process stopped (SIGSTOP)", "train", "SIGABRT 30 s after the time-out, 1; with `--restarts` the same bits",
          "a process that is stopped is continued, or it would never act on SIGABRT", "continue-to-abort", DROP,
          f"{HANGS}::test_the_only_process_is_stopped"),
    Fault("a shard that never arrives", "train", "75 after the time-out, the rank is named",
          "a rank publishes what it waits for", "waits-for-data", DROP, f"{HANGS}::test_a_shard_that_never_arrives"),
    Fault("a node that never arrives", "start", "75, the missing ranks are named",
          "all wait for all, with a deadline", "rendezvous-deadline", NEVER, f"{HANGS}::test_a_node_that_never_arrives"),
    Fault("a stop while the first node does not arrive", "start", "75 at once",
          "no wait is left to torch, which would ignore the signal", "stop-before-first-node", NEVER,
          f"{HANGS}::test_a_first_node_that_never_arrives[True]"),
    Fault("a host name that cannot be resolved", "start", "75, with the name and the cure",
          "the launcher waits for the name, with a deadline", "name-deadline", condition("stops.first"),
          f"{HANGS}::test_a_name_that_cannot_be_resolved"),
    Fault("nodes with different numbers of processes", "start", "78 at once", "numbers are compared at the rendezvous",
          "same-numbers", NEVER, f"{HANGS}::test_nodes_that_expect_different_numbers"),
    Fault("a process that does not exit in time", "train", f"killed after the grace period, {AGAIN}",
          "the grace period has an end", "grace", NEVER,
          f"{HANGS}::test_a_process_that_does_not_exit_in_time_is_killed"),
    Fault("a second job on the same run", "start", "75, the owner is named; the first job is not disturbed",
          "a run's folder has a lease", "lease", ALWAYS, f"{OWNERS}::test_a_second_job_refuses_naming_the_owner"),
    Fault("a second job while the first one exits", "start", "it waits, then resumes from the first one's last save",
          "after a wait, the checkpoint is chosen again", "choose-again", NEVER,
          f"{OWNERS}::test_a_second_job_waits_for_the_first_to_exit"),
    Fault("an owner suspended, and continued after a takeover", "train", "it exits with 75 and writes nothing",
          "an owner that sees a newer attempt ends itself", "lease-lost", NEVER,
          f"{OWNERS}::test_a_suspended_owner_loses_the_run_and_exits"),
    Fault("the run's folder is moved, and another run's put in its place", "train",
          "it exits with 78 and writes nothing more, neither here nor there",
          "an owner compares the folder with the one that it took", "folder-lost", NEVER,
          f"{FILES}::test_a_job_whose_folder_is_gone_ends_with_all_its_processes[replace]"),
    Fault("a shard vanishes", "train", SHARD, "a checkpoint is saved when data fails", "save-on-data-error", DROP,
          f"{DATA}::test_a_shard_is_harmed[vanish-train]"),
    Fault("a shard shrinks", "train", SHARD, "if one rank cannot read, all ranks exit together", "data-error-for-all",
          replace("if error is not None:\n    raise error"), f"{DATA}::test_a_shard_is_harmed[shrink-train]"),
    Fault("a shard's bytes change", "train", SHARD, "every read is checked against the manifest", "digest-of-shard",
          NEVER, f"{DATA}::test_a_shard_is_harmed[change-train]"),
    Fault("an image of a tar file changes", "train", SHARD, "each image is compared with its digest in the index",
          "digest-of-sample", NEVER, "tests/test_decoded.py::test_an_image_that_changed_is_named"),
    Fault("a shard changes", "evaluate", SHARD, "all ranks exit from an evaluation together", "data-error-for-all",
          replace("if error is not None:\n    raise error"), f"{DATA}::test_a_shard_is_harmed[change-test]"),
    Fault("an exception in one rank", "train", "1, shown once: host, phase, step, traceback",
          "workers report to the launcher, which shows the first failure", "show-traceback", NEVER,
          f"{CODES}::test_a_fault_of_the_program_is_shown_once_with_its_traceback"),
    Fault("an exception on another node", "train", "1 on both nodes, and in RUN/exit.json",
          "a process that fails alone leaves an error record in the store", "record-failure", DROP,
          f"{CODES}::test_a_fault_on_another_node_is_reported_by_the_first"),
    Fault("a crash (SIGSEGV) on another node", "train", "1 on both nodes, and in RUN/exit.json",
          "its launcher leaves a record in RUN/nodes", "crash-elsewhere", DROP,
          f"{CODES}::test_a_crash_on_another_node_is_reported_by_the_first"),
    Fault("a process killed on another node", "train", f"75, it is named on the first node too; {AGAIN}",
          "the first node's launcher reads who was killed elsewhere", "killed-elsewhere", replace("killed = []"),
          f"{CODES}::test_a_process_killed_on_another_node_is_named_by_the_first"),
    Fault("an exception in one rank while another one is gone", "train", "1, with the traceback",
          "only what a collective raised can be a lost peer", "where-it-was-raised", condition("self._world.size > 1"),
          f"{LOSSES}::test_an_error_of_the_model_is_its_fault_though_another_process_is_gone"),
    Fault("an error of the model in the backward pass", "train", "1, with the traceback",
          "a peer counts as lost only if its connection is broken", "no-peer-is-gone",
          replace("gone = [1 - self._world.rank]"),
          f"{LOSSES}::test_an_error_of_the_model_is_its_fault_whatever_it_says[backward-gradient]"),
    Fault("a failure while the main thread of another rank waits outside collectives, as for a GPU", "train",
          "within 3 s the other one ends with the same code", "a thread of each rank asks every second",
          "ends-with-peer", DROP, f"{WATCHDOG}::test_a_failure_ends_the_others_wherever_they_wait[rank1]"),
    Fault("rank 0, which serves the store, fails", "train", "the others end with its code",
          "it stays until all have seen why", "linger", DROP,
          f"{WATCHDOG}::test_a_failure_ends_the_others_wherever_they_wait[rank0]"),
    Fault("a failure while another rank saves", "save", "the checkpoint is completed, then the rank ends with the same code",
          "a rank that saves is not ended", "completes-save", replace('return phase != "end"'),
          f"{WATCHDOG}::test_a_failure_ends_the_others_wherever_they_wait[rank1]"),
    Fault("a process killed on another node while others wait outside collectives", "train", "75 within 3 s on all nodes",
          "the kernel closes the connection of a process that ends", "liveness", DROP,
          f"{WATCHDOG}::test_a_process_killed_on_another_node_ends_the_others[rank1]"),
    Fault("a process that leaves with 0", "train", "1, with rank, phase and step",
          "workers report that their command is done", "left-early", replace("return self.code != EXIT_OK"),
          f"{CODES}::test_a_process_that_leaves_with_0_in_the_middle[forward-leave:1]"),
    Fault("a restart by torchrun, whose store is kept", "start", "the next attempt starts like the first one",
          "each attempt has its own part of the store, named by rank 0", "fresh-part", replace("return arrivals"),
          f"{RENDEZVOUS}::test_a_process_of_the_next_attempt_may_come_long_before_rank_0"),
    Fault("a network interface that does not exist", "start", "78, with the interfaces there are",
          "GLOO_SOCKET_IFNAME is checked first", "interfaces", DROP,
          f"{CODES}::test_an_interface_that_does_not_exist"),
    Fault("a node that cannot start", "start", "78 on both nodes at once",
          "processes at the rendezvous look for error records of others", "failure-while-waiting",
          replace("failure = None"), f"{CODES}::test_one_node_that_cannot_start_ends_all[environment]"),
    Fault("a data set that one node lacks", "start", "78 on both nodes at once",
          "the ranks agree on the result of what can fail on one of them", "all-or-none",
          replace("if error is not None:\n    raise error"),
          f"{CODES}::test_one_node_that_cannot_start_ends_all[data]"),
    Fault("a crash (SIGSEGV)", "train", "1", "only signals from outside count as a lost process", "crash-is-a-fault",
          replace("_FROM_OUTSIDE = set(signal.Signals)"), f"{CODES}::test_a_crash_is_a_fault"),
    Fault("a job that makes no progress", "first step", "75, 75, then 1",
          "attempts without progress are counted in RUN", "attempts-limit", NEVER,
          f"{CODES}::test_attempts_without_progress_are_bounded"),
    Fault("1, 2, 3, 1 and 4 processes in turn", "all", "same ids; fp64 weights within 1e-10 of one process",
          "the loss is scaled by W / G, as DDP averages over W ranks", "loss-scale",
          replace("return 2 / global_batch_size"), f"{CODES}::test_any_number_of_processes_resumes"),
    Fault("the link between two nodes is cut", "train", f"both nodes: 75 within the time-out; {AGAIN}",
          "every rank has a watchdog", "watchdog-expires", DROP, f"{LINKS}::test_a_link_that_is_cut"),
    Fault("a server that answers 503 now and then", "data", "tried again after random waits that grow",
          "temporary errors are tried again", "fetch-retries",
          replace("retrying = tenacity.Retrying(stop=tenacity.stop_after_attempt(1), reraise=True)"),
          f"{FETCH}::test_a_run_from_a_flaky_server_without_a_cache_is_the_local_run"),
    Fault("a truncated body, or other bytes", "data", "tried again; never trained on",
          "length and sha256 are checked before anything is stored", "wrong-bytes", replace("reason = None"),
          f"{FETCH}::test_what_may_pass_is_tried_again"),
    Fault("a body without end", "data", "given up; bounded in memory and time",
          "no byte more than the manifest promises is read", "no-more-than-promised",
          replace("while True:\n    chunk = file.read(_CHUNK_BYTES)\n    if not chunk:\n        break\n"
                  "    content.write(chunk)"),
          f"{FETCH}::test_a_body_without_end_takes_neither_memory_nor_time"),
    Fault("a server or file system that hangs", "data", "each try has an end",
          "every try runs in a thread, with a deadline", "fetch-deadline", condition("remaining <= -10"),
          f"{FETCH}::test_a_file_system_that_hangs_and_knows_no_time_out_is_given_up"),
    Fault("a server that is gone", "data", "75: it may answer later", "it is distinguished from data that is wrong",
          "unreachable", DROP,
          f"{FETCH}::test_a_server_that_dies_ends_the_run_with_one_message"),
    Fault("a stop while a fetch hangs", "data", "abandoned at once", "waits and fetches end when reading is stopped",
          "fetch-sees-stop", ALWAYS, f"{FETCH}::test_closing_does_not_wait_for_the_network"),
    Fault("a damaged file in the cache", "data", "fetched again", "cached bytes are checked at every read",
          "check-cached-bytes", replace("intact = data is not None"),
          f"{FETCH}::test_a_damaged_entry_is_fetched_once_again"),
    Fault("a full cache disk", "data", "older files are deleted; if that is not enough, one warning, and training continues",
          "bytes that cannot be stored are used from memory", "full-cache", replace("raise OSError(reason)"),
          f"{FETCH}::test_a_full_disk_makes_room_and_without_any_warns_once"),
    Fault("four processes fill one cache", "data", "its limit is kept, every byte is right",
          "space is reserved before it is counted", "cache-bound", DROP, f"{FETCH}::test_four_processes_share_a_cache"),
    Fault("a server that ignores range requests", "data", "the tar file is fetched once, whole, into the cache",
          "only an answer with status 206 is a range", "partial-content", NEVER,
          f"{RANGES}::test_a_whole_file_is_fetched_once_and_every_range_read_from_it"),
    Fault("a whole tar file with other bytes", "data", "tried again; no range of it is read",
          "its sha256 is checked while it is written", "whole-file-digest", NEVER,
          f"{RANGES}::test_a_whole_file_that_is_not_the_indexed_one_is_fetched_again"),
    Fault("a process killed while it fetches a whole tar file for all of its node", "data",
          "one of the others fetches it", "they wait for a lock, which ends with its process", "fetched-by-one", DROP,
          f"{RANGES}::test_a_process_killed_while_it_fetches_a_file_is_replaced_by_one_of_those_that_wait"),
    Fault("a process stopped while it fetches a whole tar file for all of its node", "data",
          "the others fetch it themselves", "they wait only while the file grows", "holder-that-hangs", NEVER,
          f"{RANGES}::test_no_wait_for_a_lock_is_endless[hangs]"),
    Fault("a process killed, with `--restarts`", "train", "the job continues from the newest checkpoint; same bits",
          "an attempt that ended by a loss is followed by another one", "restart-after-loss", ALWAYS,
          f"{RESTARTS}::test_processes_are_started_again"),
    Fault("an exception in one rank, with `--restarts`", "train", "1, without another attempt",
          "only an attempt that ended by a loss is followed by another one", "loss-only", replace("return True"),
          f"{RESTARTS}::test_a_job_that_ends_all_the_same[raise:1:30-2-1-a fault of the model]"),
    Fault("a standby process killed", "train", "a restart starts a new process instead", "one that does not answer is skipped",
          "standby-that-ended", replace("process.send(variables, store, output)\nreturn process.popen"),
          f"{STANDBY}::test_a_standby_process_that_has_ended_is_replaced"),
    Fault("an exception on another node, with `--restarts`", "train", "1 on all nodes",
          "a launcher that ends tells the others before the next attempt", "end-of-one", NEVER,
          f"{AGREEMENT}::test_the_end_of_one_is_the_end_of_all"),
    Fault("a node lost, with `--restarts` and without `--min-nodes`", "restart", "75, it is named",
          "launchers agree on who takes part in an attempt", "too-few-nodes", NEVER,
          f"{AGREEMENT}::test_too_few_nodes_end_the_job"),
    Fault("the link is cut while launchers agree on an attempt", "restart", "the node takes part in the next attempt",
          "a decision whose attempt has ended does not count", "decision-that-is-over", NEVER,
          f"{AGREEMENT}::test_a_link_that_is_cut_after_the_post[True]"),
    Fault("a launcher ends while it waits for the next attempt", "restart", "the others do not wait for its processes",
          "a launcher that is ready counts only while it says so", "stale-post", ALWAYS,
          f"{AGREEMENT}::test_a_launcher_that_has_ended_after_its_post_does_not_take_part"),
    Fault("the launcher of the first node hangs", "restart", "75, its address is named", "each answer has a deadline",
          "answer-deadline", replace("thread.join()"),
          f"{AGREEMENT}::test_a_first_node_that_does_not_answer_is_named"),
    Fault("a store without conditional writes", "start", "78", "the first object is created a second time",
          "conditional-writes", NEVER, f"{MIRROR}::test_a_store_that_ignores_conditions_is_refused"),
    Fault("a second job with the same mirror", "train", "75 for the first job, which writes nothing more",
          "the newest attempt in the mirror is looked up", "mirror-taken-over", NEVER,
          f"{MIRROR}::test_a_job_that_was_replaced_writes_nothing_more[s3]"),
    Fault("a second job while a checkpoint is sent to the mirror", "train", "75; the checkpoint does not appear there",
          "the attempts are looked up before a checkpoint becomes visible", "check-before-commit",
          replace("self._store.put(_name_of(saved.step), pieces, size, lambda: None)"),
          f"{MIRROR}::test_a_job_that_was_replaced_writes_nothing_more[s3]"),
    Fault("a damaged checkpoint in the mirror", "start", "it is named, the run resumes from the one before, same bits",
          "digests are checked after a download", "mirrored-digests", NEVER,
          f"{MIRROR}::test_an_unreadable_checkpoint_is_skipped"),
    Fault("a mirror without a readable checkpoint", "start", "78, no new run is begun", "it does not count as an empty one",
          "no-silent-restart-of-mirror", NEVER, f"{MIRROR}::test_an_unreadable_checkpoint_is_skipped"),
    Fault("a full mirror", "save, end", "a warning; 1 if the last checkpoint is not there",
          "the end waits for the mirror", "mirror-error-at-end", DROP,
          f"{MIRROR}::test_a_full_bucket_ends_in_an_error_and_the_next_attempt_completes_the_copy"),
]  # fmt: skip

INTRO = """\
# Faults

Each fault was injected into a real job (`distrain launch`, 2 processes or more). Nothing was lost in any of them: each run
was then started again, if it could resume at all, and ended with the same weights, bit for bit, the same ids in every step
and the same metrics as an undisturbed run. Exit codes: 75 run it again, 78 not again unchanged, 1 a fault.

A fault counts only if its test fails without the guard against it. A guard is a statement of the code, marked by a comment
`# guard: NAME`. `make guards` removes each guard from a copy of the code and runs the test there. `make faults` runs the
tests, and the hundred kills; `make test` runs a short form.

| | fault | phase | what the job does | guard | fails without it |
|---|---|---|---|---|---|
"""

OUTRO = """
## A hundred kills

`make faults PART=kills` sends SIGKILL a hundred times to one run of 900 steps on 2 processes: in turns to one worker, all
workers, the launcher alone, everything, and rank 0; each time at an event drawn at random. {kills}

## Limits

- Faults that neither end nor stop a process but change what it computes (a bit that flips in memory or on the way to the
  device) are not detected. Digests cover what is on disk.
- Steps between the last checkpoint and a SIGKILL are trained again, with the same result; their time is lost.
- If a disk stays full until the process ends, the lines and checkpoints that could not be written are lost; the next
  attempt trains those steps again.
- On a network file system that shows new files late (NFS with long attribute caches), an owner that lost its lease can
  write for that long. Otherwise leases rely only on `link` and `rename` being atomic.
- `PR_SET_PDEATHSIG` exists on Linux only. Elsewhere the workers of a killed launcher continue; the lease prevents damage.
- NCCL was not available: everything here was tried on CPUs with gloo.
"""


def table() -> str:
    """Return the text of docs/faults.md."""
    tried, markers = _read_results(), find(REPO)
    lines = []
    for number, fault in enumerate(FAULTS, 1):
        marked = markers[fault.marker]
        result = "yes" if tried.get(fault.key) == digest(fault, marked) else "not tried with this code"
        guard = f"{fault.guard} (`{fault.marker}` in `{marked.file}`)"
        lines.append(f"| {number} | {fault.name} | {fault.phase} | {fault.outcome} | {guard} | {result} |\n")
    kills = KILLS.read_text().strip() if KILLS.exists() else ""
    return INTRO + "".join(lines) + OUTRO.format(kills=kills)


def digest(fault: Fault, marked: Marked) -> str:
    """Return the digest of a guard, its removal and its test: results count as long as it does not change."""
    file, _, name = fault.test.partition("::")
    source = (REPO / file).read_text()
    functions = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    test = next(ast.get_source_segment(source, node) for node in functions if node.name == name.partition("[")[0])
    parts = (fault.marker, str(fault.removal.of_condition), fault.removal.text, marked.source, str(test))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def try_one(fault: Fault, marked: Marked) -> tuple[bool | None, str]:
    """Run the fault's test without the guard.

    Returns:
        Whether it fails, or None if it ran out of time, which tells nothing; and the failed assertion, or the output.
    """
    with tempfile.TemporaryDirectory(prefix="distrain-guards-") as folder:
        copy = Path(folder)
        for name in ("distrain", "tests", "configs"):
            shutil.copytree(REPO / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPO / "pyproject.toml", copy)
        (copy / marked.file).write_text(fault.removal.apply(marked))
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--timeout", "300", fault.test]
        environ = {**os.environ, "PYTHONPATH": folder}
        done = subprocess.run(command, cwd=copy, env=environ, capture_output=True, text=True, check=False)
    if done.returncode == 1 and " failed" in done.stdout and "from pytest-timeout" not in done.stdout:
        lines = [line.strip() for line in done.stdout.splitlines() if line.startswith((">  ", "E  "))]
        return True, " ".join(line[:150] for line in lines[:2])
    passed = done.returncode == 0 and " passed" in done.stdout
    return False if passed else None, (done.stdout + done.stderr)[-2000:]


def try_all(names: list[str]) -> int:
    """Try the guards whose test, name or marker contains one of `names`; without names, all that changed.

    Returns:
        How many tests did not fail.
    """
    tried, markers = _read_results(), find(REPO)
    missed = 0
    for fault in FAULTS:
        marked = markers[fault.marker]
        unchanged = tried.get(fault.key) == digest(fault, marked)
        if unchanged if not names else not any(name in f"{fault.key} {fault.name} {fault.marker}" for name in names):
            continue
        fails, details = try_one(fault, marked)
        result = {True: "fails without it", False: "PASSES WITHOUT IT", None: "NO RESULT"}[fails]
        print(f"{result}: {fault.key}\n  {details}", flush=True)
        missed += not fails
        tried.pop(fault.key, None)
        if fails:
            tried[fault.key] = digest(fault, marked)
        known = {each.key for each in FAULTS}
        TRIED.write_text(json.dumps({key: tried[key] for key in tried if key in known}, indent=1) + "\n")
    return missed


def _read_results() -> dict[str, str]:
    return dict(json.loads(TRIED.read_text())) if TRIED.exists() else {}


if __name__ == "__main__":
    if sys.argv[1:2] == ["try"]:
        sys.exit(min(try_all(sys.argv[2:]), 1))
    if sys.argv[1:] == ["table"]:
        TABLE.write_text(table())
        sys.exit()
    sys.exit(__doc__)
