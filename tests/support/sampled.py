"""Tests with many rows of one kind, of which every n-th runs by default and the others in `slow`.

Rows are families, variants, sizes or numbers of one check; which ones run by default moves from
test to test, so that each family meets some check of every kind.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

EVERY = {
    "compiler/test_containers.py::test_token_types_are_refused_with_their_place": 4,
    "compiler/test_cost.py::test_estimates": 4,
    "compiler/test_exact.py::test_any_dimensions": 2,
    "compiler/test_exact.py::test_batch_and_length": 2,
    "compiler/test_exact.py::test_gpt2_variants": 3,
    "compiler/test_exact.py::test_opt_variants": 3,
    "compiler/test_families.py::test_both_back_ends_agree": 3,
    "compiler/test_families.py::test_initial_logits": 6,
    "compiler/test_families.py::test_masks": 4,
    "compiler/test_families.py::test_paper": 3,
    "compiler/test_families.py::test_paper_in_the_top_block": 4,
    "compiler/test_families.py::test_value_attention": 4,
    "compiler/test_families.py::test_variant": 3,
    "compiler/test_half_precision_alibi.py::test_far_positions_keep_their_differences": 2,
    "compiler/test_half_precision_updates.py::test_a_trained_model": 3,
    "compiler/test_half_precision_updates.py::test_direction_of_the_update": 3,
    "compiler/test_hand_written.py::test_odd_blocks_learn_as_autograd_has_it": 2,
    "compiler/test_hand_written.py::test_parts_may_have_any_name": 3,
    "compiler/test_onnx.py::test_families": 5,
    "compiler/test_onnx.py::test_other_types": 2,
    "compiler/test_optimizations.py::test_all_equal_none": 4,
    "compiler/test_paper.py::test_one_deviation_from_exact": 3,
    "compiler/test_paper.py::test_one_deviation_from_paper": 3,
    "compiler/test_paper.py::test_paper_with_every_activation": 2,
    "compiler/test_refused_families.py::test_operators_are_named": 3,
    "oracle/test_casts.py::test_a_captured_model": 3,
    "passes/test_masks.py::test_biases_of_keys": 2,
    "passes/test_masks.py::test_causal_masks": 2,
    "passes/test_masks.py::test_windows_count_the_token_itself": 3,
    "runtime/transformer/test_emit.py::test_every_choice": 3,
    "runtime/transformer/test_emit.py::test_every_scenario": 3,
    "runtime/transformer/test_emit.py::test_given_sizes": 2,
    "runtime/transformer/test_emit.py::test_lower_precision": 5,
    "runtime/transformer/test_emit.py::test_other_models": 2,
    "runtime/transformer/test_emit.py::test_outer_gradients": 4,
    "runtime/transformer/test_structure.py::test_sharing_changes_no_bit": 2,
    "runtime/transformer/test_structure.py::test_weights_reach_the_stream_through_pages_alone": 3,
    "runtime/transformer/test_transformer_families.py::test_counts": 4,
    "runtime/transformer/test_transformer_families.py::test_equal_results": 4,
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
        every = EVERY[test]
        for index, item in enumerate(found):
            if index % every != offset % every and len(found) > 1:
                item.add_marker(pytest.mark.slow)
