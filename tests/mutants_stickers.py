"""Mutants of the sticker world: training targets, guidance, measures and loading."""

from __future__ import annotations

from mutant import Mutant

TESTS = "tests/test_stickers_models.py::"

MUTANTS = (
    Mutant(
        "stickers-teacher-shift",
        "steering/stickers/train/unet.py",
        "x = x - (1.0 - t) * self.shift",
        "x = x - t * self.shift",
        (TESTS + "test_the_teachers_noise_is_exact_where_its_velocity_is",),
    ),
    Mutant(
        "stickers-teacher-noise",
        "steering/stickers/train/unet.py",
        "return x + (1.0 - t) * velocity.float()",
        "return x + t * velocity.float()",
        (TESTS + "test_the_teachers_noise_is_exact_where_its_velocity_is",),
    ),
    Mutant(
        "stickers-times-unshifted",
        "steering/stickers/train/unet.py",
        "(torch.special.ndtri(u) + TIME_SHIFT).sigmoid()",
        "torch.special.ndtri(u).sigmoid()",
        (TESTS + "test_training_times_cover_the_flows_times_evenly",),
    ),
    Mutant(
        "stickers-walk-guidance",
        "steering/stickers/train/turbo.py",
        "(plain + guidance * (told - plain))",
        "(told + guidance * (told - plain))",
        (TESTS + "test_the_teachers_walk_is_guided_euler",),
    ),
    Mutant(
        "stickers-turbo-second-order",
        "steering/stickers/train/turbo.py",
        "solver_order=1",
        "solver_order=2",
        (TESTS + "test_turbo_scheduler_takes_straight_steps",),
    ),
    Mutant(
        "stickers-frechet-root",
        "steering/stickers/measure.py",
        "- 2.0 * roots.sum()",
        "- roots.sum()",
        (TESTS + "test_frechet_distance_has_its_closed_form",),
    ),
    Mutant(
        "stickers-oracle-draws",
        "steering/stickers/measure.py",
        "if not any(verdicts)",
        "if not all(verdicts)",
        (TESTS + "test_the_oracle_stops_early_without_changing_its_answer",),
    ),
    Mutant(
        "stickers-overall-by-image",
        "steering/stickers/measure.py",
        'out | {"overall": float(np.mean(list(out.values())))}',
        'out | {"overall": float(values.mean())}',
        (TESTS + "test_shares_are_means_of_tags",),
    ),
    Mutant(
        "stickers-swap-nothing",
        "steering/stickers/train/clip.py",
        'colors=(second["color"], first["color"])',
        'colors=(first["color"], second["color"])',
        (TESTS + "test_swapped_captions_name_the_other_scene",),
    ),
    Mutant(
        "stickers-all-negatives-hard",
        "steering/stickers/train/clip.py",
        "for caption in told if rng.random() < HARD",
        "for caption in told",
        ("tests/test_stickers_train.py::test_hard_negatives_are_few_and_swapped",),
    ),
    Mutant(
        "stickers-negative-of-no-image-is-asked",
        "steering/stickers/train/clip.py",
        "F.cross_entropy(logits, same / same.sum(-1, keepdim=True))",
        "F.cross_entropy(logits[:, :n], same[:, :n] / same[:, :n].sum(-1, keepdim=True))",
        ("tests/test_stickers_train.py::test_a_hard_negative_is_a_wrong_answer_for_images_only",),
    ),
    Mutant(
        "stickers-source-name",
        "steering/loading.py",
        "                return shipped",
        "                return EMBEDDED",
        (TESTS + "test_every_shipped_model_is_loaded_by_name",),
    ),
)
