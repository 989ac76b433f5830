"""Tests with many rows of one kind, of which every n-th runs by default and the others in `slow`.

Rows are families, variants, sizes, dtypes or messages of one check. Which ones run by default
differs from test to test. In a grid with an axis of two values, an odd n meets both. Sampled
elsewhere are grids (`grid.py`), pages (`docs/test_snippets.py`), random decoders and `tests/fuzz`.
Whole by default: the updates of every family (`test_families.py::test_exact`), every operator
against autograd, every pass, every command.
"""

from __future__ import annotations

import zlib
from collections import defaultdict

import pytest

EVERY = {
    "cli/test_compiled_sources.py::TestModel::test_is_the_one_that_was_compiled": 3,
    "cli/test_cost_command.py::TestCommand::test_refusals": 2,
    "cli/test_cost_command.py::test_predicts_what_a_compiled_simulator_has": 3,
    "cli/test_eval_command.py::test_bad_ablation_options": 2,
    "cli/test_eval_command.py::test_bad_options": 2,
    "cli/test_sheet.py::test_every_table_fits_80_columns": 3,
    "compiler/frontend/test_gguf.py::TestSource::test_compiles": 2,
    "compiler/frontend/test_hub.py::TestRefusedByItsConfig::test_nothing_is_fetched": 3,
    "compiler/test_artifact.py::TestRoundTrip::test_bit_for_bit": 3,
    "compiler/test_artifact.py::TestWriting::test_real_limit_on_file_size": 3,
    "compiler/test_checks.py::test_writes_through_views_of_layers_that_start_at_zero": 3,
    "compiler/test_containers.py::test_a_step_is_that_of_autograd": 3,
    "compiler/test_containers.py::test_refused": 2,
    "compiler/test_containers.py::test_token_types_are_refused_with_their_place": 8,
    "compiler/test_cost.py::test_a_batch_in_slices": 5,
    "compiler/test_cost.py::test_cost_grows_as_it_should": 2,
    "compiler/test_cost.py::test_estimates": 7,
    "compiler/test_cost.py::test_estimates_without_optimizations": 2,
    "compiler/test_cost_families.py::test_constants_have_their_numbers_and_weights_none": 4,
    "compiler/test_cost_families.py::test_counts_what_compile_has": 4,
    "compiler/test_direct.py::test_is_what_torch_counts": 3,
    "compiler/test_driver.py::TestSources::test_dtype": 2,
    "compiler/test_exact.py::test_any_dimensions": 2,
    "compiler/test_exact.py::test_batch_and_length": 3,
    "compiler/test_exact.py::test_float32": 5,
    "compiler/test_exact.py::test_float64": 5,
    "compiler/test_exact.py::test_gpt2_variants": 5,
    "compiler/test_exact.py::test_opt_variants": 5,
    "compiler/test_families.py::test_both_back_ends_agree": 11,
    "compiler/test_families.py::test_initial_logits": 31,
    "compiler/test_families.py::test_loss_gradients": 3,
    "compiler/test_families.py::test_masks": 9,
    "compiler/test_families.py::test_paper": 11,
    "compiler/test_families.py::test_paper_in_the_top_block": 11,
    "compiler/test_families.py::test_value_attention": 11,
    "compiler/test_families.py::test_variant": 11,
    "compiler/test_half_precision_alibi.py::test_far_positions_keep_their_differences": 3,
    "compiler/test_half_precision_updates.py::test_a_trained_model": 5,
    "compiler/test_half_precision_updates.py::test_direction_of_the_update": 11,
    "compiler/test_half_precision_updates.py::test_effect_on_the_logits": 2,
    "compiler/test_hand_written.py::test_both_back_ends_agree": 3,
    "compiler/test_hand_written.py::test_equals_autograd": 5,
    "compiler/test_hand_written.py::test_odd_blocks_learn_as_autograd_has_it": 7,
    "compiler/test_hand_written.py::test_parts_may_have_any_name": 5,
    "compiler/test_hand_written.py::test_refused": 3,
    "compiler/test_onnx.py::test_families": 13,
    "compiler/test_onnx.py::test_inputs": 5,
    "compiler/test_onnx.py::test_opsets": 5,
    "compiler/test_onnx.py::test_other_types": 5,
    "compiler/test_onnx.py::test_presets_and_steps": 3,
    "compiler/test_onnx.py::test_the_file": 3,
    "compiler/test_optimizations.py::test_all_equal_none": 11,
    "compiler/test_optimizations.py::test_all_equal_none_in_float32": 3,
    "compiler/test_optimizations.py::test_each_alone": 2,
    "compiler/test_optimizations.py::test_each_is_switched": 2,
    "compiler/test_optimizations.py::test_every_kind_of_input": 3,
    "compiler/test_optimizations.py::test_low_rank_equals_materialized": 5,
    "compiler/test_paper.py::test_float32_update_of_a_small_model": 3,
    "compiler/test_paper.py::test_float32_update_of_tiny_opt": 2,
    "compiler/test_paper.py::test_one_deviation_from_exact": 6,
    "compiler/test_paper.py::test_one_deviation_from_paper": 6,
    "compiler/test_paper.py::test_padded_batch_equals_alone": 3,
    "compiler/test_paper.py::test_paper": 5,
    "compiler/test_paper.py::test_paper_with_every_activation": 3,
    "compiler/test_parameters.py::test_every_parameter_is_counted_once": 5,
    "compiler/test_refused_families.py::test_operators_are_named": 8,
    "compiler/test_summary.py::test_estimate": 3,
    "compiler/test_summary.py::test_model": 3,
    "compiler/test_train.py::test_both_ends": 3,
    "compiler/test_train.py::test_inside_the_blocks": 3,
    "compiler/test_train_rules.py::test_every_rule": 7,
    "compiler/test_verification.py::TestAgrees::test_source_without_a_config": 2,
    "evaluate/test_ablation.py::test_errors_are_those_of_autograd": 5,
    "evaluate/test_ablation.py::test_kinds_come_from_the_graph": 3,
    "evaluate/test_benchmark.py::test_equals_an_optimizer_and_the_exact_simulator": 3,
    "evaluate/test_benchmark.py::test_other_dtypes": 2,
    "evaluate/test_benchmark.py::test_trains_the_parameters_that_the_simulator_updates": 2,
    "evaluate/test_classification.py::test_random_labels_give_no_significant_gain": 3,
    "evaluate/test_learners.py::test_dynamic_evaluation_is_autograd_and_sgd": 5,
    "oracle/test_casts.py::test_a_captured_model": 6,
    "oracle/test_reference.py::test_differences_tend_to_derivatives": 2,
    "oracle/test_reference.py::test_exact_is_plain_fine_tuning": 2,
    "passes/test_build_descent.py::test_the_hand_written_decoder_equals_autograd": 3,
    "passes/test_canonicalize.py::test_leaves_the_rest_alone": 2,
    "passes/test_canonicalize.py::test_spells_linear_one_way": 2,
    "passes/test_causal_attention.py::test_same_numbers": 3,
    "passes/test_flash_attention.py::test_same_numbers": 3,
    "passes/test_fuse_residuals.py::test_same_numbers_of_other_models": 3,
    "passes/test_masks.py::test_biases_of_keys": 4,
    "passes/test_masks.py::test_causal_masks": 7,
    "passes/test_masks.py::test_leaves_the_rest_alone_and_says_why": 5,
    "passes/test_masks.py::test_soft_caps": 2,
    "passes/test_masks.py::test_windows_count_the_token_itself": 5,
    "passes/test_merge_products.py::test_numbers": 3,
    "passes/test_never_misread.py::test_never_misread": 3,
    "passes/test_recognize_activation.py::test_fires": 3,
    "passes/test_recognize_activation.py::test_leaves_others_alone": 2,
    "passes/test_recognize_activation.py::test_spellings": 5,
    "passes/test_recognize_attention.py::test_fires": 3,
    "passes/test_recognize_attention.py::test_leaves_the_rest_alone_and_says_why": 3,
    "passes/test_recognize_linear.py::test_grouped_queries": 3,
    "passes/test_recognize_norm.py::test_norms_of_heads": 3,
    "passes/test_recognize_norm.py::test_spellings": 5,
    "passes/test_rotary.py::test_fires": 3,
    "passes/test_rotary.py::test_leaves_the_rest_alone_and_says_why": 3,
    "passes/test_rotary.py::test_what_positions_do_need_not_be_a_rotation": 3,
    "passes/test_scores.py::test_what_is_done_to_scores_adds_up": 2,
    "passes/test_select_trainable.py::test_a_stack_inside_a_sequential": 3,
    "passes/test_select_trainable.py::test_half_blocks_are_refused": 2,
    "runtime/test_copies.py::test_a_copy_keeps_what_was_set": 2,
    "runtime/test_in_torch.py::test_on_meta_calls_give_shapes": 2,
    "runtime/test_simulator.py::test_dtypes": 5,
    "runtime/transformer/test_emit.py::test_every_choice": 5,
    "runtime/transformer/test_emit.py::test_every_scenario": 11,
    "runtime/transformer/test_emit.py::test_given_sizes": 4,
    "runtime/transformer/test_emit.py::test_lengths": 5,
    "runtime/transformer/test_emit.py::test_lower_precision": 7,
    "runtime/transformer/test_emit.py::test_other_models": 3,
    "runtime/transformer/test_emit.py::test_outer_gradients": 4,
    "runtime/transformer/test_structure.py::test_sharing_changes_no_bit": 5,
    "runtime/transformer/test_structure.py::test_the_structure_holds_no_number_of_the_model": 5,
    "runtime/transformer/test_structure.py::test_weights_reach_the_stream_through_pages_alone": 5,
    "runtime/transformer/test_transformer_families.py::test_counts": 9,
    "runtime/transformer/test_transformer_families.py::test_equal_results": 7,
    "runtime/transformer/test_transformer_families.py::test_float32": 2,
    "runtime/transformer/test_transformer_families.py::test_outer_gradients": 2,
    "runtime/transformer/test_transformer_families.py::test_pages_give_back_the_model": 3,
    "runtime/transformer/test_transformer_families.py::test_sharing_changes_no_bit": 7,
    "runtime/transformer/test_transformer_families.py::test_the_models_have_what_they_stand_for": 5,
}


def mark_others_slow(items: list[pytest.Item]) -> None:
    """Marks the rows that do not run by default; they are the same whatever else is collected."""
    rows: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        test = item.nodeid.partition("[")[0].removeprefix("tests/")
        if test in EVERY and item.get_closest_marker("slow") is None:
            rows[test].append(item)
    for test, found in rows.items():
        every, offset = min(EVERY[test], len(found)), zlib.crc32(test.encode())
        for index, item in enumerate(found):
            if index % every != offset % every and len(found) > 1:
                item.add_marker(pytest.mark.slow)
