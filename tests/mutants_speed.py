"""Mutants of what makes runs fast without changing a number."""

from __future__ import annotations

from mutant import Mutant

NOISE = "tests/test_noise.py"
TWICE = "tests/test_duplicates.py"
SHORT = "tests/test_kernels_short_attention.py"
NETWORK = "tests/test_kernels_network.py"

MUTANTS = (
    Mutant(
        "noise ahead: one key for all rows of a pass",
        "steering/noise.py",
        "low, high = ((digests >> s",
        "low, high = ((digests[:1].repeat(len(keys)) >> s",
        (f"{NOISE}::test_many_streams_in_one_pass_give_the_numbers_of_each",),
    ),
    Mutant(
        "noise ahead: rows in the order of drawing",
        "steering/noise.py",
        "[self._rows.pop(name) for name in wanted]",
        "[self._rows.pop(name) for name in sorted(wanted)]",
        (f"{NOISE}::test_noise_drawn_ahead_is_the_noise_of_its_name",),
    ),
    Mutant(
        "noise ahead: without bounds",
        "steering/noise.py",
        "_AHEAD = 2**16",
        "_AHEAD = 2**40",
        (f"{NOISE}::test_what_is_expected_is_drawn_in_one_pass_within_bounds",),
    ),
    Mutant(
        "auto dtype: dot products of bfloat16 forgotten",
        "steering/loading.py",
        '("_is_amx_tile_supported", "_is_avx512_bf16_supported")',
        '("_is_amx_tile_supported",)',
        (f"{NETWORK}::test_auto_takes_bfloat16_where_the_processor_computes_it",),
    ),
    Mutant(
        "decoder: as wide as the network",
        "steering/engine.py",
        "return min(limit, _DECODES) if",
        "return limit if",
        ("tests/test_engine.py::test_wide_decodes_are_cut_where_network_calls_are_not",),
    ),
    Mutant(
        "copies: prompts forgotten",
        "steering/duplicates.py",
        "(*row, level, cond) for",
        "(*row, level) for",
        (f"{TWICE}::test_equal_states_at_other_levels_or_of_other_prompts_are_other_questions",),
    ),
    Mutant(
        "copies: levels forgotten",
        "steering/duplicates.py",
        "(*row, level, cond) for",
        "(*row, cond) for",
        (f"{TWICE}::test_equal_states_at_other_levels_or_of_other_prompts_are_other_questions",),
    ),
    Mutant(
        "copies: a few numbers stand for the whole state",
        "steering/duplicates.py",
        "seen.setdefault(_bits(flat[k]), k)",
        "group[0]",
        (f"{TWICE}::test_one_number_anywhere_makes_another_question",),
    ),
    Mutant(
        "copies: one graph for all of them",
        "steering/engine.py",
        "if self.deduplicate and not batch.grad else None",
        "if self.deduplicate else None",
        (f"{TWICE}::test_derivatives_of_copies_are_each_their_own",),
    ),
    Mutant(
        "copies: only what was computed is charged",
        "steering/batch.py",
        "asked = self.tasks[k].ledger, round(float(expected[k]) * scale)",
        "asked = self.tasks[k].ledger, round(float(computed[k]) * scale)",
        (f"{TWICE}::test_a_copy_is_computed_once_counted_as_asked_and_answered_in_its_place",),
    ),
    Mutant(
        "attention: the first layer speaks for all head sizes",
        "kernels/attention.py",
        "for heads, size in shapes]",
        "for heads, size in shapes[:1]]",
        (
            "tests/test_kernels_attention.py::"
            "test_a_head_size_that_a_backend_does_not_do_is_named_and_another_serves",
        ),
    ),
    Mutant(
        "memory: a view counts as new",
        "steering/memory.py",
        "self._note(given, made=False)",
        "pass",
        ("tests/test_memory.py::test_bytes_alive_at_once_are_counted",),
    ),
    Mutant(
        "memory: nothing is ever given back",
        "steering/memory.py",
        "self.live -= self._sizes.pop(name, 0)",
        "self._sizes.pop(name, 0)",
        ("tests/test_memory.py::test_bytes_alive_at_once_are_counted",),
    ),
    Mutant(
        "memory: what one row took is forgotten",
        "steering/memory.py",
        "rows_that_fit(taken, free, self.limits[batch.kind])",
        "self.limits[batch.kind]",
        (
            "tests/test_memory.py::"
            "test_a_run_short_of_memory_looks_at_one_row_and_keeps_to_what_fits",
        ),
    ),
    Mutant(
        "loading: denoisers change their memory format too",
        "steering/loading.py",
        'part = getattr(pipe, "vae", None)\n    if part is None or channels_last',
        'part = getattr(pipe, "vae", None)\n    getattr(pipe, "unet", part).to('
        "memory_format=torch.channels_last)\n    if part is None or channels_last",
        (
            "tests/test_kernels_network.py::"
            "test_the_memory_format_changes_no_picture_and_only_the_autoencoder",
        ),
    ),
    Mutant(
        "short attention: later calls are left to the fused kernel",
        "kernels/short_attention.py",
        "            with sdpa_kernel(SDPBackend.MATH):\n                yield",
        "            yield",
        (f"{SHORT}::test_the_watched_call_gives_the_bits_of_later_ones",),
    ),
    Mutant(
        "short attention: keys are not counted",
        "kernels/short_attention.py",
        "max(query.shape[-2], key.shape[-2])",
        "query.shape[-2]",
        (f"{SHORT}::test_longer_sequences_are_left_to_torch",),
    ),
    Mutant(
        "short attention: one call decides for none after it",
        "kernels/short_attention.py",
        "(self.longest or 0) > SHORT",
        "self.longest is None",
        (SHORT,),
    ),
)
