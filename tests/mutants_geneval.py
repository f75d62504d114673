"""Mutants of GenEval: rules, decoding, colours, runs, reports, Ray."""

from __future__ import annotations

from mutant import Mutant

RULES = "tests/test_geneval_rules.py::"
SCENES = f"{RULES}test_perfect_scenes_pass_and_single_violations_fail"
DECODE = "tests/test_geneval_detectors.py::"
RUN = "tests/test_geneval_run.py::"
REPORT = "tests/test_geneval_report.py::"
RAY = "tests/test_geneval_ray.py::"

MUTANTS = (
    Mutant(
        "geneval: counting uses the plain threshold",
        "rewards/geneval.py",
        'self.counting_threshold if tag == "counting" else self.threshold',
        "self.threshold",
        (f"{RULES}test_thresholds_are_exceeded_not_met",),
    ),
    Mutant(
        "geneval: a threshold met is enough",
        "rewards/geneval.py",
        "found[k][1] > least]",
        "found[k][1] >= least]",
        (f"{RULES}test_thresholds_are_exceeded_not_met",),
    ),
    Mutant(
        "geneval: seventeen objects count",
        "rewards/geneval.py",
        "max_objects: int = 16",
        "max_objects: int = 17",
        (f"{RULES}test_at_most_sixteen_objects_of_a_class_count",),
    ),
    Mutant(
        "geneval: colours asked of kept, not given, indices",
        "rewards/geneval.py",
        "color_of(name, kept[name][k])",
        "color_of(name, k)",
        (f"{RULES}test_the_most_certain_object_is_asked_for_its_colour",),
    ),
    Mutant(
        "geneval: one object too many is fine",
        "steering/stickers/rules.py",
        'if seen < clause["count"] else reason',
        'if seen <= clause["count"] else reason',
        (f"{SCENES}[counting]",),
    ),
    Mutant(
        "geneval: directions by the shortened offset",
        "steering/stickers/rules.py",
        "beyond / np.linalg.norm(offset)",
        "beyond / np.linalg.norm(beyond)",
        (f"{RULES}test_positions_follow_the_published_rule_on_random_boxes",),
    ),
    Mutant(
        "geneval: margin forgotten",
        "rewards/geneval.py",
        ", margin=rules.margin",
        "",
        (f"{RULES}test_the_margin_is_a_tenth_and_can_be_changed",),
    ),
    Mutant(
        "geneval: a failed target still serves",
        "steering/stickers/rules.py",
        "group if all(p.passed for p in found) else None",
        "group",
        (f"{RULES}test_a_failed_target_leaves_no_target_and_a_failed_colour_no_position",),
    ),
    Mutant(
        "geneval: any pair of objects and targets will do",
        "steering/stickers/rules.py",
        "if all(relation in relations(*pair, margin) for pair in pairs):",
        "if any(relation in relations(*pair, margin) for pair in pairs):",
        (f"{RULES}test_every_pair_of_objects_and_targets_must_stand_so",),
    ),
    Mutant(
        "mask2former: no-object is a class",
        "rewards/geneval_detectors.py",
        "classes.softmax(-1)[:, :-1].flatten()",
        "classes[:, :-1].softmax(-1).flatten()",
        (f"{DECODE}test_mask2former_decodes_as_the_straightforward_twin",),
    ),
    Mutant(
        "mask2former: padding kept in the masks",
        "rewards/geneval_detectors.py",
        "_upsample(masks[query], padded)[: inner[0], : inner[1]]",
        "_upsample(masks[query], padded)",
        (f"{DECODE}test_mask2former_decodes_as_the_straightforward_twin",),
    ),
    Mutant(
        "mask2former: boxes end on the last pixel",
        "rewards/geneval_detectors.py",
        "float(xs[-1]) + 1, float(ys[-1]) + 1",
        "float(xs[-1]), float(ys[-1])",
        (f"{DECODE}test_boxes_end_behind_the_last_pixel",),
    ),
    Mutant(
        "mask2former: sides rounded down",
        "rewards/geneval_detectors.py",
        "int(width * scale + 0.5))",
        "int(width * scale))",
        (f"{DECODE}test_mask2former_decodes_as_the_straightforward_twin",),
    ),
    Mutant(
        "geneval: black behind the mask",
        "rewards/geneval_colors.py",
        "GREY = 0x99 / 255",
        "GREY = 0.0",
        (f"{DECODE}test_crops_are_grey_outside_the_mask_like_pils",),
    ),
    Mutant(
        "geneval: colours handed to the wrong image",
        "rewards/geneval_colors.py",
        "read = [{k: next(answers) for k in rows} for rows in wanted]",
        "read = [{k: next(answers) for k in rows} for rows in wanted[::-1]][::-1]",
        (f"{DECODE}test_rendered_scenes_pass_and_agree_with_the_sticker_judge",),
    ),
    Mutant(
        "geneval run: a cut-off line stays in the way",
        "apps/geneval_store.py",
        "                file.truncate(self._size)\n                file.seek(self._size)\n",
        "                file.seek(0, os.SEEK_END)\n",
        (f"{RUN}test_what_a_kill_can_leave_behind_is_cleared_up",),
    ),
    Mutant(
        "geneval run: the line before the image",
        "apps/geneval_store.py",
        "        _write(path, made.png)\n        sha",
        "        sha",
        (f"{RUN}test_killed_at_random_moments_and_resumed_nothing_is_lost_or_made_twice",),
    ),
    Mutant(
        "geneval run: images are not looked at when resuming",
        "apps/geneval_store.py",
        'elif digest(self.folder / row["file"]) == row["sha256"]:',
        "else:",
        (f"{RUN}test_what_a_kill_can_leave_behind_is_cleared_up",),
    ),
    Mutant(
        "geneval run: a second result counts",
        "apps/geneval_store.py",
        "        if job.key in self.done:\n            return\n",
        "",
        (f"{RUN}test_a_second_result_for_one_image_is_not_counted",),
    ),
    Mutant(
        "geneval run: seed not part of the recipe",
        "apps/geneval_folder.py",
        '"images_per_prompt", "seed")',
        '"images_per_prompt")',
        (f"{RUN}test_another_recipe_in_the_same_folder_is_refused",),
    ),
    Mutant(
        "geneval run: all images of a prompt share a seed",
        "apps/geneval_run.py",
        "{job.prompt}/{job.image}",
        "{job.prompt}",
        (f"{RUN}test_images_have_seeds_of_their_own_and_recipes_that_repeat_them",),
    ),
    Mutant(
        "geneval run: a full disk leaves half a line",
        "apps/geneval_store.py",
        "                except OSError:\n                    file.truncate(self._size)\n",
        "                except OSError:\n",
        (f"{RUN}test_a_journal_on_a_full_disk_keeps_whole_lines",),
    ),
    Mutant(
        "geneval report: macro is micro",
        "apps/geneval_report.py",
        "np.mean([self.micro(total, count, tag) for tag in self.present], axis=0)",
        "self.micro(total, count)",
        (f"{REPORT}test_shares_are_those_of_the_drawn_scenes",),
    ),
    Mutant(
        "geneval report: differences resampled apart",
        "apps/geneval_report.py",
        'boot.micro(*two) - boot.micro(*one)),\n        "tags"',
        'boot.micro(*two) - np.roll(boot.micro(*one), 1)),\n        "tags"',
        (f"{REPORT}test_paired_differences_are_tighter_than_two_intervals",),
    ),
    Mutant(
        "geneval report: intervals of 70 %",
        "apps/geneval_report.py",
        "np.nanquantile(values[1:], [0.025, 0.975])",
        "np.nanquantile(values[1:], [0.15, 0.85])",
        (f"{REPORT}test_intervals_cover_the_truth_as_often_as_they_say",),
    ),
    Mutant(
        "geneval page: prompts not escaped",
        "apps/geneval_page.py",
        "<b>{escape(record['prompt'])}</b>",
        "<b>{record['prompt']}</b>",
        (f"{REPORT}test_prompts_and_names_cannot_break_out_of_the_page",),
    ),
    Mutant(
        "ray: what has failed goes with the others",
        "apps/cluster.py",
        "again = [[job] for job in jobs if job.tries]",
        "again = [[job for job in jobs if job.tries]]",
        (f"{RAY}test_work_is_shared_in_whole_prompts_and_failures_go_alone",),
    ),
)
