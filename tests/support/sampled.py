"""Tests with many rows of one kind, of which every n-th runs by default and the others in `slow`.

Rows are families, variants, sizes or numbers of one check; which ones run by default moves from
test to test, so that each family meets some check of every kind.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

EVERY = {
    "cli/test_compiled_sources.py::TestModel::test_is_the_one_that_was_compiled": 2,
    "cli/test_cost_command.py::TestCommand::test_refusals": 2,
    "cli/test_cost_command.py::test_predicts_what_a_compiled_simulator_has": 2,
    "cli/test_eval_command.py::test_bad_ablation_options": 2,
    "cli/test_eval_command.py::test_bad_options": 2,
    "cli/test_sheet.py::test_every_table_fits_80_columns": 2,
    "cli/test_streams.py::test_from_a_shell": 2,
    "compiler/test_artifact.py::TestRoundTrip::test_bit_for_bit": 2,
    "compiler/test_artifact.py::TestWriting::test_real_limit_on_file_size": 3,
    "compiler/test_containers.py::test_a_step_is_that_of_autograd": 2,
    "compiler/test_containers.py::test_token_types_are_refused_with_their_place": 8,
    "compiler/test_cost.py::test_a_batch_in_slices": 2,
    "compiler/test_cost.py::test_estimates": 8,
    "compiler/test_cost_families.py::test_constants_have_their_numbers_and_weights_none": 4,
    "compiler/test_cost_families.py::test_counts_what_compile_has": 4,
    "compiler/test_direct.py::test_is_what_torch_counts": 4,
    "compiler/test_driver.py::TestSources::test_dtype": 2,
    "compiler/test_exact.py::test_any_dimensions": 2,
    "compiler/test_exact.py::test_batch_and_length": 4,
    "compiler/test_exact.py::test_float32": 2,
    "compiler/test_exact.py::test_float64": 2,
    "compiler/test_exact.py::test_gpt2_variants": 3,
    "compiler/test_exact.py::test_opt_variants": 3,
    "compiler/test_families.py::test_both_back_ends_agree": 6,
    "compiler/test_families.py::test_exact": 3,
    "compiler/test_families.py::test_initial_logits": 12,
    "compiler/test_families.py::test_loss_gradients": 2,
    "compiler/test_families.py::test_masks": 8,
    "compiler/test_families.py::test_paper": 6,
    "compiler/test_families.py::test_paper_in_the_top_block": 8,
    "compiler/test_families.py::test_value_attention": 8,
    "compiler/test_families.py::test_variant": 6,
    "compiler/test_half_precision_alibi.py::test_far_positions_keep_their_differences": 2,
    "compiler/test_half_precision_updates.py::test_a_trained_model": 3,
    "compiler/test_half_precision_updates.py::test_direction_of_the_update": 6,
    "compiler/test_half_precision_updates.py::test_effect_on_the_logits": 2,
    "compiler/test_hand_written.py::test_both_back_ends_agree": 2,
    "compiler/test_hand_written.py::test_equals_autograd": 2,
    "compiler/test_hand_written.py::test_odd_blocks_learn_as_autograd_has_it": 4,
    "compiler/test_hand_written.py::test_parts_may_have_any_name": 3,
    "compiler/test_hand_written.py::test_refused": 2,
    "compiler/test_onnx.py::test_families": 10,
    "compiler/test_onnx.py::test_inputs": 2,
    "compiler/test_onnx.py::test_opsets": 2,
    "compiler/test_onnx.py::test_other_types": 4,
    "compiler/test_onnx.py::test_presets_and_steps": 2,
    "compiler/test_onnx.py::test_the_file": 2,
    "compiler/test_optimizations.py::test_all_equal_none": 8,
    "compiler/test_optimizations.py::test_each_is_switched": 2,
    "compiler/test_optimizations.py::test_every_kind_of_input": 2,
    "compiler/test_optimizations.py::test_low_rank_equals_materialized": 2,
    "compiler/test_paper.py::test_float32_update_of_a_small_model": 2,
    "compiler/test_paper.py::test_one_deviation_from_exact": 6,
    "compiler/test_paper.py::test_one_deviation_from_paper": 6,
    "compiler/test_paper.py::test_padded_batch_equals_alone": 2,
    "compiler/test_paper.py::test_paper": 2,
    "compiler/test_paper.py::test_paper_with_every_activation": 2,
    "compiler/test_parameters.py::test_every_parameter_is_counted_once": 2,
    "compiler/test_refused_families.py::test_operators_are_named": 8,
    "compiler/test_summary.py::test_model": 2,
    "evaluate/test_ablation.py::test_errors_are_those_of_autograd": 2,
    "evaluate/test_benchmark.py::test_equals_an_optimizer_and_the_exact_simulator": 2,
    "evaluate/test_benchmark.py::test_trains_the_parameters_that_the_simulator_updates": 2,
    "evaluate/test_classification.py::test_random_labels_give_no_significant_gain": 2,
    "evaluate/test_learners.py::test_dynamic_evaluation_is_autograd_and_sgd": 2,
    "oracle/test_casts.py::test_a_captured_model": 3,
    "oracle/test_reference.py::test_differences_tend_to_derivatives": 2,
    "oracle/test_reference.py::test_exact_is_plain_fine_tuning": 2,
    "passes/test_build_descent.py::test_the_hand_written_decoder_equals_autograd": 2,
    "passes/test_canonicalize.py::test_leaves_the_rest_alone": 2,
    "passes/test_canonicalize.py::test_spells_linear_one_way": 2,
    "passes/test_masks.py::test_biases_of_keys": 4,
    "passes/test_masks.py::test_causal_masks": 4,
    "passes/test_masks.py::test_leaves_the_rest_alone_and_says_why": 2,
    "passes/test_masks.py::test_windows_count_the_token_itself": 3,
    "passes/test_merge_products.py::test_numbers": 2,
    "passes/test_recognize_activation.py::test_leaves_others_alone": 2,
    "passes/test_recognize_activation.py::test_spellings": 2,
    "passes/test_recognize_attention.py::test_fires": 2,
    "passes/test_recognize_attention.py::test_leaves_the_rest_alone_and_says_why": 2,
    "passes/test_recognize_norm.py::test_norms_of_heads": 2,
    "passes/test_recognize_norm.py::test_spellings": 2,
    "passes/test_rotary.py::test_fires": 2,
    "passes/test_rotary.py::test_leaves_the_rest_alone_and_says_why": 2,
    "passes/test_scores.py::test_what_is_done_to_scores_adds_up": 2,
    "passes/test_select_trainable.py::test_half_blocks_are_refused": 2,
    "runtime/test_simulator.py::test_dtypes": 2,
    "runtime/transformer/test_emit.py::test_every_choice": 3,
    "runtime/transformer/test_emit.py::test_every_scenario": 6,
    "runtime/transformer/test_emit.py::test_given_sizes": 4,
    "runtime/transformer/test_emit.py::test_lengths": 2,
    "runtime/transformer/test_emit.py::test_lower_precision": 5,
    "runtime/transformer/test_emit.py::test_other_models": 2,
    "runtime/transformer/test_emit.py::test_outer_gradients": 4,
    "runtime/transformer/test_structure.py::test_sharing_changes_no_bit": 2,
    "runtime/transformer/test_structure.py::test_the_structure_holds_no_number_of_the_model": 2,
    "runtime/transformer/test_structure.py::test_weights_reach_the_stream_through_pages_alone": 3,
    "runtime/transformer/test_transformer_families.py::test_counts": 8,
    "runtime/transformer/test_transformer_families.py::test_equal_results": 4,
    "runtime/transformer/test_transformer_families.py::test_pages_give_back_the_model": 2,
    "runtime/transformer/test_transformer_families.py::test_sharing_changes_no_bit": 6,
    "runtime/transformer/test_transformer_families.py::test_the_models_have_what_they_stand_for": 4,
}


def mark_others_slow(items: list[pytest.Item]) -> None:
    """Marks the rows that do not run by default."""
    rows: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        test = item.nodeid.partition("[")[0].removeprefix("tests/")
        if test in EVERY and item.get_closest_marker("slow") is None:
            rows[test].append(item)
    for offset, (test, found) in enumerate(sorted(rows.items())):
        every = min(EVERY[test], len(found))
        for index, item in enumerate(found):
            if index % every != offset % every and len(found) > 1:
                item.add_marker(pytest.mark.slow)
