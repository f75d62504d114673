"""Mutants of what reads and scores pictures: steer score, pixels, CLIP, arithmetic, memory."""

from __future__ import annotations

from mutant import Mutant

SCORE = "tests/test_score_cli.py::"
MEMORY = "tests/test_rewards_memory.py::"
CLIP = "tests/test_rewards_clip.py::"
PIXELS = "tests/test_rewards_pixels.py::"
SIMPLE = "tests/test_rewards_simple.py::"
SUMS = "tests/test_rewards_arithmetic.py::"
JUDGE = "tests/test_rewards_vlm.py::"
QWEN = "tests/test_rewards_qwen.py::"
FACTS = "tests/test_rewards_facts.py::"
HALVED = f"{MEMORY}test_rows_are_halved_until_they_fit_and_keep_their_order"
OFFLOAD = f"{MEMORY}test_offload_leaves_the_network_on_the_cpu_unless_a_gradient_follows"

MUTANTS = (
    Mutant(
        "loading a reward draws from the caller's generator",
        "rewards/checkpoints.py",
        "with TURN, torch.inference_mode(False), torch.random.fork_rng(devices=[]):",
        "with TURN, torch.inference_mode(False):",
        (
            "tests/test_rewards_clip.py::test_loading_leaves_the_callers_random_state",
            "tests/test_rewards_vqascore.py::test_loading_leaves_the_callers_random_state",
        ),
    ),
    Mutant(
        "score asks a comparison in batches",
        "apps/bench.py",
        "step = len(group) if compares(reward) else most(size)",
        "step = most(size)",
        (f"{SCORE}test_a_served_comparison_is_asked_about_all_pictures_at_once",),
    ),
    Mutant(
        "score shows a reward no bench",
        "apps/score.py",
        "resolve_reward(text, bench)",
        "resolve_reward(text)",
        (f"{SCORE}test_a_served_comparison_is_asked_about_all_pictures_at_once",),
    ),
    Mutant(
        "score finds missing weights on the way",
        "apps/score.py",
        "resolve_reward(text, bench)",
        "resolve_reward(text)",
        (f"{SCORE}test_weights_that_are_missing_are_said_before_anything_is_scored",),
    ),
    Mutant(
        "score survives reward errors only",
        "apps/score.py",
        "            except SteeringError as error:",
        "            except RewardError as error:",
        (f"{SCORE}test_whatever_a_reward_raises_the_finished_scores_stay",),
    ),
    Mutant(
        "score splits a comparison of weight zero",
        "apps/bench.py",
        "or any(map(compares, parts))",
        "",
        (f"{SCORE}test_a_part_without_weight_gets_all_pictures_too",),
    ),
    Mutant(
        "score leaves rows of a failed reward valid",
        "apps/score.py",
        'row["valid"] = False',
        "pass",
        (f"{SCORE}test_what_was_finished_before_a_reward_failed_is_kept",),
    ),
    Mutant(
        "score tabulates the worst first",
        "apps/score.py",
        "key=lambda r: -(v if",
        "key=lambda r: (v if",
        (f"{SCORE}test_the_table_has_the_best_on_top",),
    ),
    Mutant(
        "memory is asked for the same again",
        "rewards/memory.py",
        "        size = count // 2",
        "        size = max(count - 1, 1)",
        (HALVED,),
    ),
    Mutant(
        "memory warns at every halving",
        "rewards/memory.py",
        "if size == wanted:",
        "if size:",
        (HALVED,),
    ),
    Mutant(
        "memory errors of rewards mean nothing to a search",
        "rewards/memory.py",
        "class RewardMemoryError(RewardError, MemoryError):",
        "class RewardMemoryError(RewardError):",
        (f"{MEMORY}test_one_row_that_does_not_fit_is_a_clear_error",),
    ),
    Mutant(
        "memory takes any failure for its own",
        "rewards/memory.py",
        "if not out_of_memory(error):",
        "if False:",
        (f"{MEMORY}test_other_failures_are_not_tried_again",),
    ),
    Mutant(
        "offload takes a judge away before its backward pass",
        "rewards/chat_local.py",
        "offload=self.offload and not follows",
        "offload=self.offload",
        (OFFLOAD,),
    ),
    Mutant(
        "offload takes a detector away before its backward pass",
        "rewards/detection.py",
        "offload=self.offload and not follows",
        "offload=self.offload",
        (OFFLOAD,),
    ),
    Mutant(
        "offload leaves FlanT5 where it computed",
        "rewards/vqascore.py",
        "with at_work(net, offload=self.offload and not needs_gradient(images)):",
        "with at_work(net, offload=False):",
        (OFFLOAD,),
    ),
    Mutant(
        "clip text features are no unit vectors",
        "rewards/clip.py",
        "found = torch.nn.functional.normalize(found, dim=-1)",
        "found = found + 0",
        (f"{CLIP}test_equals_open_clip_on_pil",),
    ),
    Mutant(
        "clip scale is forgotten",
        "rewards/clip.py",
        "return self.scale * (net.image(images)",
        "return (net.image(images)",
        (f"{CLIP}test_micro_batches_and_scale_change_nothing_else",),
    ),
    Mutant(
        "clip encodes the prompts of every call",
        "rewards/clip.py",
        "new = [p for p in dict.fromkeys(prompts) if p not in self._text]",
        "new = list(dict.fromkeys(prompts))",
        (f"{CLIP}test_each_prompt_is_encoded_once",),
    ),
    Mutant(
        "clip_loading takes any activation",
        "rewards/clip_loading.py",
        'if has != bool(cfg.get("quick_gelu", False)) and twin',
        "if False and twin",
        (f"{CLIP}test_wrong_activation_is_refused_before_any_weights",),
    ),
    Mutant(
        "clip_loading runs on random weights",
        "rewards/clip_loading.py",
        "return model, pretrained\n    if any(mark",
        'return model, ""\n    if any(mark',
        (f"{CLIP}test_a_weights_file_with_a_named_model",),
    ),
    Mutant(
        "clip_loading lets a bundled model change its weights",
        "rewards/clip_loading.py",
        'if pretrained not in ("", _DEFAULT_TAG):',
        "if False:",
        (f"{CLIP}test_what_cannot_be_loaded",),
    ),
    Mutant(
        "pixels of the longer side are rounded",
        "rewards/pixels.py",
        "long = int(side * max(height, width) / short)",
        "long = round(side * max(height, width) / short)",
        (f"{PIXELS}test_parity_with_the_transform_of_open_clip",),
    ),
    Mutant(
        "pixels normalise by one channel's mean",
        "rewards/pixels.py",
        "        return (x - mean) / std",
        "        return (x - mean[:1]) / std",
        (f"{PIXELS}test_apply_normalises_per_channel",),
    ),
    Mutant(
        "pixels are padded behind the picture",
        "rewards/pixels.py",
        "left, top = more_w // 2, more_h // 2",
        "left, top = 0, 0",
        (f"{PIXELS}test_pad_square_pads_before_scaling",),
    ),
    Mutant(
        "pixels of eight bits are cut, not rounded",
        "rewards/pixels.py",
        "images.clamp(0, 1).mul_(255).round_().div_(255)",
        "images.clamp(0, 1).mul_(255).floor_().div_(255)",
        (f"{PIXELS}test_eight_bits_are_the_nearest",),
    ),
    Mutant(
        "hps3 gives its spread for its mean",
        "rewards/hps3.py",
        'Scores(value=found[:, 0], parts={"sigma": found[:, 1]})',
        'Scores(value=found[:, 1], parts={"sigma": found[:, 0]})',
        (f"{QWEN}test_hps3_equals_the_published_recipe",),
    ),
    Mutant(
        "hps3 reads no prompt",
        "rewards/hps3.py",
        'rubric.replace("{text_prompt}", p)',
        'rubric.replace("{text_prompt}", p and "")',
        (f"{QWEN}test_prompt_and_picture_both_matter",),
    ),
    Mutant(
        "jpeg at the quality of Pillow",
        "rewards/jpeg.py",
        '"JPEG", quality=self.quality',
        '"JPEG"',
        (f"{SIMPLE}test_jpeg_counts_the_bytes_of_the_file",),
    ),
    Mutant(
        "jpeg likes large files",
        "rewards/jpeg.py",
        "value=self.sign * kilobytes",
        "value=kilobytes",
        (f"{SIMPLE}test_jpeg_counts_the_bytes_of_the_file",),
    ),
    Mutant(
        "jpeg counts in KiB",
        "rewards/jpeg.py",
        "file.tell() / 1000",
        "file.tell() / 1024",
        (f"{SIMPLE}test_jpeg_counts_the_bytes_of_the_file",),
    ),
    Mutant(
        "arithmetic multiplies minus infinity by zero",
        "rewards/arithmetic.py",
        "if weight else torch.zeros_like(found.value)",
        "",
        (f"{SUMS}test_minus_infinity_of_weight_zero_does_not_count",),
    ),
    Mutant(
        "arithmetic scales a sum without its constant",
        "rewards/arithmetic.py",
        "for weight, part in terms], factor * offset)",
        "for weight, part in terms], offset)",
        (f"{SUMS}test_a_sum_is_scaled_with_its_constant",),
    ),
    Mutant(
        "arithmetic asks equal components twice",
        "rewards/arithmetic.py",
        "return a is b or (a.spec is not None and a.spec == b.spec)",
        "return False",
        (f"{SUMS}test_each_component_is_evaluated_once",),
    ),
    Mutant(
        "arithmetic adapts no component to the model",
        "rewards/arithmetic.py",
        "adapt(model) if adapt else reward",
        "reward",
        (f"{SUMS}test_for_model_reaches_every_component",),
    ),
    Mutant(
        "chat_server counts the likeliest spelling only",
        "rewards/chat_server.py",
        "float(torch.tensor(logps).logsumexp(0))",
        "max(logps)",
        (f"{JUDGE}test_the_server_gives_what_the_model_gives_here",),
    ),
    Mutant(
        "chat_server sends no key",
        "rewards/chat_server.py",
        "if key else {}",
        "if False else {}",
        (f"{JUDGE}test_requests_hold_exact_pictures_and_the_key",),
    ),
    Mutant(
        "chat_server drops what was answered",
        "rewards/chat_server.py",
        "raise Unfinished(str(error), found) from error",
        "raise Unfinished(str(error), [None] * len(found)) from error",
        (f"{JUDGE}test_what_was_answered_before_the_server_died_is_kept",),
    ),
    Mutant(
        "a count claims a gradient before it is asked",
        "rewards/detection.py",
        "differentiable: ClassVar[bool] = False",
        "differentiable: ClassVar[bool] = True",
        (f"{FACTS}test_a_count_has_no_gradient_by_default",),
    ),
    Mutant(
        "images beyond the limit do not name its flag",
        "apps/serve_reward.py",
        "Serve with --max-images",
        "Serve with more than",
        (f"{SCORE}test_a_served_comparison_is_asked_about_all_pictures_at_once",),
    ),
)
