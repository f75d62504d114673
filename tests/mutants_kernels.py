"""Mutants of the kernels, their twins and the network side."""

from __future__ import annotations

from mutant import Mutant

STEP = "tests/test_kernels_step.py"
RESAMPLE = "tests/test_kernels_resample.py"
RESIZE = "tests/test_kernels_resize.py"
ATTENTION = "tests/test_kernels_attention.py"
NETWORK = "tests/test_kernels_network.py"
FUSED = f"{STEP}::test_interpreted_kernel_equals_its_twin[cases]"
NUMBERS = f"{STEP}::test_interpreted_kernel_equals_its_twin[numbers]"
WEIGHTS = f"{STEP}::test_the_twin_makes_the_step_of_every_transition"

MUTANTS = (
    Mutant(
        "kernels: one round of Philox too few",
        "kernels/step_triton.py",
        "tl.static_range(10)",
        "tl.static_range(9)",
        (NUMBERS,),
    ),
    Mutant(
        "kernels: normal numbers in another order",
        "kernels/step_triton.py",
        "tl.interleave(r0 * c0, r1 * c1)",
        "tl.interleave(r1 * c1, r0 * c0)",
        (FUSED,),
    ),
    Mutant(
        "kernels: the high half of the slot is dropped",
        "kernels/step_triton.py",
        "philox(block, zero + low, zero, zero + high, k0, k1)",
        "philox(block, zero + low, zero, zero, k0, k1)",
        (FUSED,),
    ),
    Mutant(
        "kernels: guidance from the wrong side",
        "kernels/step_triton.py",
        "out = b + guidance * (a - b)",
        "out = a + guidance * (a - b)",
        (FUSED,),
    ),
    Mutant(
        "kernels: noise beyond the row counts in its density",
        "kernels/step_triton.py",
        "tl.sum(tl.where(inside, z * z, 0.0), 0)",
        "tl.sum(z * z, 0)",
        (FUSED,),
    ),
    Mutant(
        "kernels: fused Euler-Maruyama without its score",
        "steering/transitions.py",
        "-dt * (ds + score)",
        "-dt * ds",
        (f"{WEIGHTS}[EulerMaruyama0-linear]",),
    ),
    Mutant(
        "kernels: subclasses of a transition are fused as their parent",
        "steering/transitions.py",
        "type(transition) in (EtaKernel, EulerMaruyama)",
        "isinstance(transition, (EtaKernel, EulerMaruyama))",
        (f"{STEP}::test_only_transitions_whose_weights_say_all_are_fused",),
    ),
    Mutant(
        "kernels: a tie of systematic resampling goes down",
        "kernels/resample.py",
        "torch.minimum(found, last[:, None])",
        "torch.minimum(found + 1, last[:, None])",
        (f"{RESAMPLE}::test_each_prompt_gets_what_it_would_get_alone[8]",),
    ),
    Mutant(
        "kernels: dead prompts are resampled by the kernel",
        "kernels/resample_triton.py",
        "alive = (broken == 0) & ",
        "alive = ",
        (f"{RESAMPLE}::test_interpreted_kernel_equals_its_twin",),
    ),
    Mutant(
        "kernels: resize rounds down",
        "kernels/resize.py",
        "low.floor_().add_(1024.0)",
        "low.floor_()",
        (f"{RESIZE}::test_the_twin_is_pil_bit_for_bit",),
    ),
    Mutant(
        "kernels: resize does not clamp between the passes",
        "kernels/resize_triton.py",
        "level = tl.minimum(tl.maximum(level, 0), 255)",
        "level = tl.maximum(level, 0)",
        (f"{RESIZE}::test_interpreted_kernel_equals_its_twin",),
    ),
    Mutant(
        "kernels: clamped pixels pass gradients",
        "kernels/resize_triton.py",
        "tl.where(passed != 0, weight * grad, 0.0)",
        "weight * grad",
        (f"{RESIZE}::test_interpreted_kernel_equals_its_twin",),
    ),
    Mutant(
        "kernels: attention is not compared with float32",
        "kernels/attention.py",
        "if worst > allowed:",
        "if worst < 0.0:",
        (f"{ATTENTION}::test_a_fast_backend_with_wrong_numbers_is_out",),
    ),
    Mutant(
        "kernels: compiled numbers are not checked",
        "steering/compiled.py",
        "        if not error <= allowed:\n",
        "        if False:\n",
        (f"{NETWORK}::test_wrong_numbers_are_never_returned",),
    ),
    Mutant(
        "kernels: finished samples come from the small decoder",
        "steering/engine.py",
        'getattr(self.model, "decode_preview", None) if batch.preview else None',
        'getattr(self.model, "decode_preview", None)',
        (f"{NETWORK}::test_previews_come_from_the_small_decoder_and_samples_from_the_full_one",),
    ),
    Mutant(
        "kernels: the shortcut of decoding is not verified",
        "steering/pipelines/decoding.py",
        "if same and torch.equal(found.leave(out[0]).float(), images):",
        "if same:",
        (f"{NETWORK}::test_a_pipeline_that_does_more_than_decode_keeps_its_frames",),
    ),
)
