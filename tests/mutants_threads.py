"""Mutants of what keeps threads that share a pipeline apart."""

from __future__ import annotations

from mutant import Mutant

HERE = "tests/test_threads.py::test_"
ALONE = (f"{HERE}threads_that_share_a_pipeline_get_what_each_gets_alone",)

MUTANTS = (
    Mutant(
        "threads: a lock of each pipeline's own",
        "steering/turns.py",
        "return _TURNS.setdefault(network, threading.RLock())",
        "return threading.RLock()",
        (f"{HERE}pipelines_that_share_a_network_take_turns",),
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
        "        with self.turn:\n            for hook in",
        "        if True:\n            for hook in",
        ALONE,
    ),
    Mutant(
        "threads: decoding beside another's frozen parameters",
        "steering/pipelines/wrap.py",
        "with self._meter.turn:  # torch",
        "if True:  # torch",
        ALONE,
    ),
    Mutant(
        "threads: attention chosen by two at once",
        "kernels/short_attention.py",
        "with _MODE, sdpa_kernel(SDPBackend.MATH):",
        "with sdpa_kernel(SDPBackend.MATH):",
        (f"{HERE}the_choice_of_attention_is_put_back_when_threads_leave_in_another_order",),
    ),
    Mutant(
        "threads: names looked up while they are registered",
        "steering/registry.py",
        "with self._loading:  # other",
        "if True:  # other",
        (f"{HERE}threads_that_come_first_together_all_find_every_name",),
    ),
    Mutant(
        "threads: a reward loaded by each",
        "rewards/networked.py",
        "with LOADING, torch.inference_mode(False):  # parameters",
        "with torch.inference_mode(False):  # parameters",
        (f"{HERE}a_reward_is_loaded_once_and_scores_for_one_thread_at_a_time",),
    ),
    Mutant(
        "threads: a reward moved from under another",
        "rewards/networked.py",
        "with turn_of(net.model):",
        "if True:",
        (f"{HERE}a_reward_is_loaded_once_and_scores_for_one_thread_at_a_time",),
    ),
)
