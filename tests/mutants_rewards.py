"""Mutants of the rewards with networks and of the ensembles."""

from __future__ import annotations

from mutant import Mutant

AESTHETIC = "tests/test_rewards_aesthetic.py::"
PICK = "tests/test_rewards_pickscore.py::"
HPS = "tests/test_rewards_hps.py::"
IMAGE = "tests/test_rewards_imagereward.py::"
QWEN = "tests/test_rewards_qwen.py::"
PAIRS = "tests/test_rewards_diversity.py::"
COMPOSE = "tests/test_rewards_compose.py::"

MUTANTS = (
    Mutant(
        "pickscore without its logit scale",
        "rewards/pickscore.py",
        "self.scale * net.model.logit_scale.exp() * cosines",
        "self.scale * cosines",
        (f"{PICK}test_score_equals_the_published_recipe",),
    ),
    Mutant(
        "pickscore with the logit scale not exponentiated",
        "rewards/pickscore.py",
        "net.model.logit_scale.exp()",
        "net.model.logit_scale",
        (f"{PICK}test_score_equals_the_published_recipe",),
    ),
    Mutant(
        "pickscore reads its padding",
        "rewards/pickscore.py",
        "self.net.get_text_features(**tokens)",
        'self.net.get_text_features(input_ids=tokens["input_ids"].flip(1))',
        (f"{PICK}test_score_equals_the_published_recipe",),
    ),
    Mutant(
        "text features kept under their neighbours",
        "rewards/clip.py",
        "self._text.update(zip(chunk, found, strict=True))",
        "self._text.update(zip(chunk, found.flip(0), strict=True))",
        (f"{PICK}test_score_equals_the_published_recipe",),
    ),
    Mutant(
        "one cached checkpoint for every folder",
        "rewards/pickscore.py",
        "return clip_towers(self.model, self.tokenizer, self.precision, where, self.name)",
        'return vars(PickScore).get("_one") or (setattr(PickScore, "_one", clip_towers('
        "self.model, self.tokenizer, self.precision, where, self.name)) or PickScore._one)",
        (f"{PICK}test_another_checkpoint_has_its_own_text",),
    ),
    Mutant(
        "the network is offloaded before its backward pass",
        "rewards/networked.py",
        "offload=self.offload and not needs_gradient(images)",
        "offload=self.offload",
        (f"{PICK}test_offload_moves_the_network_only_when_no_gradient_can_follow",),
    ),
    Mutant(
        "micro-batches get the prompts of the first",
        "rewards/networked.py",
        "images[rows].to(net.device), prompts[rows]",
        "images[rows].to(net.device), prompts[: len(images[rows])]",
        (f"{PICK}test_score_equals_the_published_recipe",),
    ),
    Mutant(
        "pickles may run code",
        "rewards/checkpoints.py",
        'torch.load(path, map_location="cpu", weights_only=True)',
        'torch.load(path, map_location="cpu", weights_only=False)',
        (f"{HPS}test_a_pickle_with_code_is_not_run",),
    ),
    Mutant(
        "aesthetic bias of the last layer only",
        "rewards/aesthetic.py",
        "weight, bias = after @ weight, after @ bias + shift",
        "weight, bias = after @ weight, shift",
        (f"{AESTHETIC}test_a_head_of_the_published_shape_folds_into_one_map",),
    ),
    Mutant(
        "aesthetic score without its bias",
        "rewards/aesthetic.py",
        "return features @ self.weight + self.bias",
        "return features @ self.weight",
        (f"{AESTHETIC}test_score_equals_the_published_recipe",),
    ),
    Mutant(
        "activations in a head go unnoticed",
        "rewards/aesthetic.py",
        "if any(b - a > 2 for a, b in pairwise(numbers)):",
        "if False:",
        (f"{AESTHETIC}test_heads_that_are_no_affine_map_are_refused",),
    ),
    Mutant(
        "SigLIP pixels with the numbers of CLIP",
        "rewards/aesthetic.py",
        'half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}',
        "half = {}",
        (f"{AESTHETIC}test_siglip_head_takes_the_squashed_picture_and_the_pooled_output",),
    ),
    Mutant(
        "features that are not unit vectors",
        "rewards/clip.py",
        "return torch.nn.functional.normalize(found.float(), dim=-1)",
        "return found.float()",
        (f"{AESTHETIC}test_score_equals_the_published_recipe",),
    ),
    Mutant(
        "HPS crops as CLIP does",
        "rewards/hps.py",
        "ratio = size / max(height, width)",
        "ratio = size / min(height, width)",
        (f"{HPS}test_pixels_equal_the_published_transform",),
    ),
    Mutant(
        "HPS pads after the normalisation",
        "rewards/hps.py",
        "return (square - mean) / std",
        "return F.pad((resized - mean) / std, (left, more_w - left, top, more_h - top))",
        (f"{HPS}test_pixels_equal_the_published_transform",),
    ),
    Mutant(
        "HPS clamps the overshoot",
        "rewards/hps.py",
        "square = F.pad(resized,",
        "square = F.pad(resized.clamp(0, 1),",
        (f"{HPS}test_pixels_are_not_those_of_clip",),
    ),
    Mutant(
        "ImageReward's text encoder is causal",
        "rewards/imagereward.py",
        "            is_decoder=False,\n",
        "            is_decoder=True,\n",
        (f"{IMAGE}test_score_equals_the_published_network",),
    ),
    Mutant(
        "ImageReward is not standardised",
        "rewards/imagereward.py",
        "return (logit - MEAN) / STD",
        "return logit / STD",
        (f"{IMAGE}test_score_equals_the_published_network",),
    ),
    Mutant(
        "ImageReward attends to padding",
        "rewards/imagereward.py",
        "attention_mask=(ids != self.tokenizer.pad_token_id).long(),",
        "attention_mask=torch.ones_like(ids),",
        (f"{IMAGE}test_score_equals_the_published_network",),
    ),
    Mutant(
        "ImageReward's first norm twice",
        "rewards/imagereward.py",
        r'(r"\.norm([12])\.", r".layer_norm\1.")',
        r'(r"\.norm([12])\.", r".layer_norm1.")',
        (f"{IMAGE}test_score_equals_the_published_network",),
    ),
    Mutant(
        "Qwen positions of the chat model",
        "rewards/qwen_reward.py",
        "places = torch.arange(longest, device=self.device).expand(3, len(rows), -1)",
        "places = torch.arange(longest, device=self.device).expand(3, len(rows), -1) // "
        "torch.tensor([1, 2, 3], device=self.device).view(3, 1, 1)",
        (f"{QWEN}test_hps3_equals_the_published_recipe",),
    ),
    Mutant(
        "Qwen patches row by row",
        "rewards/qwen_reward.py",
        "x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)",
        "x.permute(0, 1, 4, 5, 7, 8, 3, 2, 6, 9)",
        (f"{QWEN}test_sizes_and_patches_are_those_of_the_processor",),
    ),
    Mutant(
        "videoreward reads one token for all aspects",
        "rewards/videoreward.py",
        ".diagonal(dim1=1, dim2=2)",
        "[:, 0]",
        (f"{QWEN}test_videoreward_equals_the_published_recipe",),
    ),
    Mutant(
        "low-rank updates are dropped",
        "rewards/qwen_reward.py",
        "plain[name].double() + scale * (up.double() @ down.double())",
        "plain[name].double()",
        (f"{QWEN}test_low_rank_updates_are_added",),
    ),
    Mutant(
        "a picture is compared with itself",
        "rewards/diversity.py",
        "others = cosines.sum(1) - cosines.diagonal()\n    return 1 - others / (n - 1)",
        "return 1 - cosines.mean(1)",
        (f"{PAIRS}test_distance_is_the_mean_over_pairs_of_one_prompt",),
    ),
    Mutant(
        "pictures of all prompts are compared",
        "rewards/diversity.py",
        "for rows in groups(prompts, len(found)):",
        "for rows in groups(None, len(found)):",
        (f"{PAIRS}test_distance_is_the_mean_over_pairs_of_one_prompt",),
    ),
    Mutant(
        "steadiness without the first frame",
        "rewards/video.py",
        "first = (found[:, 1:] * found[:, :1])",
        "first = (found[:, 1:] * found[:, :-1])",
        (f"{PAIRS}test_steadiness_is_that_of_vbench",),
    ),
    Mutant(
        "z-scores over all prompts",
        "rewards/compose.py",
        "for rows in groups(prompts, len(values)):",
        "for rows in groups(None, len(values)):",
        (f"{COMPOSE}test_without_constants_scores_are_standardised_per_prompt",),
    ),
    Mutant(
        "ties rank by order",
        "rewards/compose.py",
        "return (below + ties / 2) / (len(values) - 1)",
        "return below / (len(values) - 1)",
        (f"{COMPOSE}test_rank_mean_is_that_of_scipy",),
    ),
    Mutant(
        "calibration forgets the mean",
        "rewards/ensemble.py",
        "return (values - mean) / std",
        "return values / std",
        (f"{COMPOSE}test_calibrated_sum_uses_fixed_constants",),
    ),
    Mutant(
        "the spread between prompts counts",
        "rewards/calibration.py",
        "squares = [value[r].sub(value[r].mean()).square().sum() for r in rows]",
        "squares = [value[r].sub(value.mean()).square().sum() for r in rows]",
        (f"{COMPOSE}test_calibration_is_measured_within_prompts_and_survives_its_file",),
    ),
    Mutant(
        "gradients are cut after they are added",
        "rewards/compose.py",
        "cut = gradient * (self.limit / norm.clamp(min=self.limit))",
        "cut = gradient",
        (f"{COMPOSE}test_clipped_gradient_is_cut_per_member_and_image",),
    ),
    Mutant(
        "short gradients are stretched to the limit",
        "rewards/compose.py",
        "norm.clamp(min=self.limit)",
        "norm",
        (f"{COMPOSE}test_clipped_gradient_is_cut_per_member_and_image",),
    ),
    Mutant(
        "rank is called stationary",
        "rewards/compose.py",
        "    differentiable = False\n    stationary = False\n",
        "    differentiable = False\n",
        (f"{COMPOSE}test_particle_methods_refuse_rewards_that_look_at_the_batch",),
    ),
    Mutant(
        "particle methods take any reward",
        "steering/api.py",
        'if method.target == "tilted":',
        "if False:",
        (f"{COMPOSE}test_particle_methods_refuse_rewards_that_look_at_the_batch",),
    ),
    Mutant(
        "a verifier that was searched looks held out",
        "steering/finish.py",
        "heldout_labels(self.tasks[0].reward, self.verifiers)",
        "heldout_labels(object(), self.verifiers)",
        (f"{COMPOSE}test_results_carry_that_mark_and_a_mere_change_of_unit_is_refused",),
    ),
    Mutant(
        "a reward of weight zero counts as searched",
        "steering/scoring.py",
        "for weight, part in terms if weight for k, v in",
        "for weight, part in terms for k, v in",
        (f"{COMPOSE}test_a_verifier_that_the_search_has_seen_says_so",),
    ),
    Mutant(
        "shares of a mixture are not normalised",
        "rewards/categories.py",
        "return [(name, share / total) for name, share in found]",
        "return [(name, share) for name, share in found]",
        (f"{COMPOSE}test_categories_come_from_the_file_then_the_record_then_the_words",),
    ),
)
