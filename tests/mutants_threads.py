"""Mutants of what keeps threads apart."""

from __future__ import annotations

from mutant import Mutant

HERE = "tests/test_threads.py::test_"
ALONE = (f"{HERE}threads_that_share_a_pipeline_get_what_each_gets_alone",)
ROUND = (f"{HERE}a_model_passes_from_thread_to_thread_and_leaves_nothing_behind",)
ONCE = (f"{HERE}a_reward_is_loaded_once_and_scores_for_one_thread_at_a_time",)

MUTANTS = (
    Mutant(
        "threads: pipelines run at will",
        "steering/pipelines/frame.py",
        "with TURN, torch.set_grad_enabled(grad):",
        "with torch.set_grad_enabled(grad):",
        (f"{HERE}what_waits_for_its_turn[noise]",),
    ),
    Mutant(
        "threads: every thread's rows are counted",
        "steering/pipelines/meter.py",
        "is not None and self._thread == threading.get_ident():",
        "is not None:",
        (f"{HERE}rows_of_the_users_own_pipeline_in_another_thread_are_not_counted",),
    ),
    Mutant(
        "threads: hooks go while others call",
        "steering/pipelines/meter.py",
        "        with TURN:\n            for hook in",
        "        if True:\n            for hook in",
        ALONE,
    ),
    Mutant(
        "threads: decoding beside another's frozen parameters",
        "steering/pipelines/wrap.py",
        "with in_turn():  # torch",
        "if True:  # torch",
        (f"{HERE}pipelines_that_share_parts_take_turns",),
    ),
    Mutant(
        "threads: an interrupt leaves parameters frozen",
        "steering/pipelines/frozen.py",
        """    try:
        for parameter in live:
            parameter.requires_grad_(False)
        yield""",
        """    for parameter in live:
        parameter.requires_grad_(False)
    try:
        yield""",
        (f"{HERE}what_is_frozen_comes_back_after_an_interrupt_half_way",),
    ),
    Mutant(
        "threads: frames go by the number of their thread",
        "steering/pipelines/script.py",
        "key = (threading.current_thread(), conds)",
        "key = (threading.get_ident(), conds)",
        ROUND,
    ),
    Mutant(
        "threads: frames outlive their thread",
        "steering/engine.py",
        "            rest()\n",
        "            pass\n",
        ROUND,
    ),
    Mutant(
        "threads: waiting is charged",
        "steering/engine.py",
        "return time.perf_counter() - waited()",
        "return time.perf_counter()",
        (f"{HERE}waiting_for_others_is_no_time_of_the_run",),
    ),
    Mutant(
        "threads: a forked process waits for one that stayed behind",
        "steering/turns.py",
        "os.register_at_fork(after_in_child=lock._at_fork_reinit)",
        "pass",
        (f"{HERE}a_forked_process_begins_with_a_free_turn",),
    ),
    Mutant(
        "threads: replays put back each other's number of threads",
        "steering/repeat.py",
        "with _REPLAYING:  # the",
        "if True:  # the",
        (f"{HERE}replays_side_by_side_leave_the_number_of_threads_as_it_was",),
    ),
    Mutant(
        "threads: names looked up while they are registered",
        "steering/registry.py",
        "with TURN:  # other",
        "if True:  # other",
        (f"{HERE}threads_that_come_first_together_all_find_every_name",),
    ),
    Mutant(
        "threads: recipes see what others freeze",
        "steering/loading.py",
        "with TURN:  # others",
        "if True:  # others",
        (f"{HERE}what_waits_for_its_turn[how it is made ready]",),
    ),
    Mutant(
        "threads: attention tried while others call",
        "steering/attention.py",
        "with TURN:  # what",
        "if True:  # what",
        (f"{HERE}what_waits_for_its_turn[attention]",),
    ),
    Mutant(
        "threads: names wait for networks",
        "steering/registry.py",
        "        if self._complete:\n            return\n        with",
        "        with",
        (f"{HERE}names_are_looked_up_without_a_turn",),
    ),
    Mutant(
        "a module that runs again is another's",
        "steering/registry.py",
        "known is not thing and _place(known) != _place(thing)",
        "known is not thing",
        (f"{HERE}a_package_that_cannot_be_imported_says_so_each_time",),
    ),
    Mutant(
        "threads: a reward loaded by each",
        "rewards/networked.py",
        "with TURN, torch.inference_mode(False):  # parameters",
        "with torch.inference_mode(False):  # parameters",
        ONCE,
    ),
    Mutant(
        "threads: a reward moved from under another",
        "rewards/networked.py",
        "    with in_turn():\n        if not is_at(",
        "    if True:\n        if not is_at(",
        ONCE,
    ),
    Mutant(
        "threads: a detector read by each",
        "rewards/checkpoints.py",
        "            with TURN:\n                return cached",
        "            if True:\n                return cached",
        (f"{HERE}the_detector_is_read_once",),
    ),
    Mutant(
        "threads: pipelines loaded side by side",
        "steering/loading.py",
        "with TURN:  # meanwhile",
        "if True:  # meanwhile",
        (f"{HERE}pipelines_are_loaded_by_several_threads_at_once",),
    ),
)
