"""Mutants of the judging rewards: VQAScore, VLM, UnifiedReward, detection, OCR, remote."""

from __future__ import annotations

from mutant import Mutant

VQA = "tests/test_rewards_vqascore.py"
VLM = "tests/test_rewards_vlm.py"
UNIFIED = "tests/test_rewards_unified.py"
DETECTION = "tests/test_rewards_detection.py"
OCR = "tests/test_rewards_ocr.py"
REMOTE = "tests/test_rewards_remote.py"
SPEC = "tests/test_rewards_spec.py"
REPORT = "tests/test_geneval_report.py"

MUTANTS = (
    Mutant(
        "flan-t5 keeps the class token",
        "rewards/clip_t5.py",
        "[:, 0 if self.with_class else 1 :]",
        "[:, 0:]",
        (f"{VQA}::test_clip_flan_t5_is_the_authors_score",),
    ),
    Mutant(
        "flan-t5 pads with black",
        "rewards/clip_t5.py",
        "colour = [int(m * 255) / 255 for m in pixels.mean]",
        "colour = [0.0 for m in pixels.mean]",
        (f"{VQA}::test_clip_flan_t5_is_the_authors_score",),
    ),
    Mutant(
        "flan-t5 scores yes without its end mark",
        "rewards/vqascore.py",
        "return logp.mean(1).exp().float()",
        "return logp[:, :-1].mean(1).exp().float()",
        (f"{VQA}::test_clip_flan_t5_is_the_authors_score",),
    ),
    Mutant(
        "flan-t5 averages over the batch",
        "rewards/vqascore.py",
        "return logp.mean(1).exp().float()",
        "return logp.mean().expand(len(logp)).exp().float()",
        (f"{VQA}::test_a_batch_equals_single_calls_in_any_order",),
    ),
    Mutant(
        "random weights pass",
        "rewards/checkpoints.py",
        "    if missing:\n        names",
        "    if False:\n        names",
        (f"{VQA}::test_weights_that_do_not_fill_the_model_are_refused",),
    ),
    Mutant(
        "padding behind the question",
        "rewards/chat_local.py",
        'tokenizer.padding_side = "left"',
        'tokenizer.padding_side = "right"',
        (f"{VLM}::test_a_batch_equals_single_calls_in_any_order",),
    ),
    Mutant(
        "one spelling of yes",
        "rewards/chat.py",
        'YES = ("Yes", "yes", " Yes", " yes", "YES")',
        'YES = ("Yes",)',
        (f"{VQA}::test_a_chat_model_gives_yes_over_yes_and_no",),
    ),
    Mutant(
        "the gradient path has values of its own",
        "rewards/chat_local.py",
        "pixels + (smooth - smooth.detach())",
        "smooth * 1.05",
        (f"{VQA}::test_following_the_gradient_raises_the_score",),
    ),
    Mutant(
        "an unreadable answer is zero",
        "rewards/vlm.py",
        "return [m if self.low <= m <= self.high else math.nan for m in marks]",
        "return [m if self.low <= m <= self.high else 0.0 for m in marks]",
        (f"{VLM}::test_bad_rubric_answers_are_nan_and_counted",),
    ),
    Mutant(
        "no floor under the mass",
        "rewards/vlm.py",
        "(mass >= self.min_mass)",
        "(mass >= 0)",
        (f"{VLM}::test_no_weight_on_any_answer_is_unreadable",),
    ),
    Mutant(
        "answers in order of arrival",
        "rewards/wire.py",
        "found = list(pool.map(guarded, items))",
        "found = [f.result() for f in concurrent.futures.as_completed("
        "[pool.submit(guarded, i) for i in items])]",
        (f"{VLM}::test_a_slow_answer_stays_in_its_row_and_a_busy_server_is_asked_again",),
    ),
    Mutant(
        "jobs go on after a failure",
        "rewards/wire.py",
        "            failed.set()\n",
        "",
        (f"{REMOTE}::test_after_a_failure_no_further_job_starts",),
    ),
    Mutant(
        "retries without end",
        "rewards/wire.py",
        "for attempt in range(self.retries + 1):",
        "for attempt in range(self.retries + 5):",
        (f"{REMOTE}::test_a_busy_server_is_asked_again_but_not_for_ever",),
    ),
    Mutant(
        "finished scores are dropped with the server",
        "rewards/remote.py",
        "error.scores = _joined(found, images.device)",
        "error.scores = None",
        (f"{REMOTE}::test_a_server_that_dies_in_mid_batch_loses_nothing_that_was_done",),
    ),
    Mutant(
        "a second call asks for everything",
        "rewards/remote.py",
        "self._kept.update({key: one for key, one in zip(keys, found, strict=True) if one})",
        "pass",
        (f"{REMOTE}::test_a_server_that_dies_in_mid_batch_loses_nothing_that_was_done",),
    ),
    Mutant(
        "images beyond the limit are scored",
        "apps/serve_reward.py",
        "if len(images) > self.limits.max_images:",
        "if False:",
        (f"{REMOTE}::test_bad_requests_are_refused",),
    ),
    Mutant(
        "pixels beyond the limit are unpacked",
        "apps/serve_reward.py",
        "if image.width * image.height > self.limits.max_pixels:",
        "if False:",
        (f"{REMOTE}::test_bad_requests_are_refused",),
    ),
    Mutant(
        "pairs in one order",
        "rewards/unified.py",
        "for a, b in ((a, b), (b, a))]",
        "for a, b in ((a, b), (a, b))]",
        (f"{UNIFIED}::test_pairs_are_ranked_in_both_orders",),
    ),
    Mutant(
        "the swapped verdict is not turned round",
        "rewards/unified.py",
        "wins = (straight.value + 1 - swapped.value) / 2",
        "wins = (straight.value + swapped.value) / 2",
        (f"{UNIFIED}::test_a_liking_for_the_first_place_cancels",
         f"{UNIFIED}::test_pairs_are_ranked_in_both_orders"),
    ),
    Mutant(
        "the reasons of think decide",
        "rewards/unified_formats.py",
        "value=_first_wins(reply, ANSWER, expected), parts",
        "value=_first_wins(reply, RANK, expected), parts",
        (f"{UNIFIED}::test_answers_that_say_nothing_are_nan",),
    ),
    Mutant(
        "shares need not sum to one",
        "rewards/unified_formats.py",
        "abs(first + second - 1) < 0.05",
        "abs(first + second - 1) < 5",
        (f"{UNIFIED}::test_answers_that_say_nothing_are_nan",),
    ),
    Mutant(
        "the expected digit forgets its rest",
        "rewards/chat.py",
        "rest = float(found[1]) % 1.0",
        "rest = 0.0",
        (f"{UNIFIED}::test_expected_digits_replace_the_written_ones",),
    ),
    Mutant(
        "no suppression of overlaps",
        "rewards/detection.py",
        "return mine[nms(boxes, mine.detach(), self.overlap)]",
        "return mine",
        (f"{DETECTION}::test_overlapping_boxes_count_once",),
    ),
    Mutant(
        "owl boxes as shares of the padded square",
        "rewards/detection_models.py",
        "corners = corners * corners.new_tensor(shares * 2)",
        "pass",
        (f"{DETECTION}::test_owl_boxes_are_shares_of_the_unpadded_picture",),
    ),
    Mutant(
        "no object may win",
        "rewards/detection_models.py",
        "p = logits.softmax(-1)[..., :-1]",
        "p = logits.softmax(-1)",
        (f"{DETECTION}::test_a_query_scores_its_class_times_the_mean_of_its_mask",),
    ),
    Mutant(
        "mask quality left out",
        "rewards/detection_models.py",
        " * quality.unsqueeze(-1)",
        "",
        (f"{DETECTION}::test_a_query_scores_its_class_times_the_mean_of_its_mask",),
    ),
    Mutant(
        "ocr minds the case",
        "rewards/ocr.py",
        'return "".join(text.split()).lower()',
        'return "".join(text.split())',
        (f"{OCR}::test_several_quotes_are_all_wanted",),
    ),
    Mutant(
        "edit distance without deletions",
        "rewards/ocr.py",
        "np.minimum(row[1:] + 1, row[:-1]",
        "np.minimum(row[1:] + 9, row[:-1]",
        (f"{OCR}::test_edit_distance_against_the_recursion",),
    ),
    Mutant(
        "a recipe says who gets the key",
        "rewards/spec.py",
        "if not self.allow_python and _tells_a_key(entry, options):",
        "if False:",
        (f"{SPEC}::test_a_spec_from_a_file_does_not_say_who_gets_a_key",),
    ),
    Mutant(
        "verifiers get their images on the cpu",
        "apps/geneval_score.py",
        "torch.stack([images[k] for k in rows]).to(judges.device)\n            records",
        "torch.stack([images[k] for k in rows])\n            records",
        (f"{REPORT}::test_verifiers_and_embedding_get_their_images_on_their_device",),
    ),
    Mutant(
        "a hard count claims a gradient",
        "rewards/detection.py",
        'object.__setattr__(self, "differentiable", self.mode == "smooth")',
        "pass",
        (f"{DETECTION}::test_a_hard_count_claims_no_gradient",),
    ),
    Mutant(
        "a served comparison is split",
        "rewards/remote.py",
        "step = self.batch_size if self.stationary else len(rows)",
        "step = self.batch_size",
        (f"{REMOTE}::test_a_served_reward_that_compares_a_call_gets_it_whole",),
    ),
)  # fmt: skip
