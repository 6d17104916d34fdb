from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvcompose_local.composing import budgets as composing_budgets
from kvcompose_local.composing.budgets import allocate_bytes, allocate_composites, allocate_layer_budgets
from kvcompose_local.errors import InvalidInput

# L=2, H=2, T=3; composite scores by rank: layer 0 has 6, 4, 1, layer 1 has 5, 2, 1
SCORES = np.array([[[1, 8, 4], [4, 1, 4]], [[9, 0, 2], [2, 1, 1]]], np.float32)
COARSE = st.integers(-3, 3).map(lambda eighths: eighths / 8)  # exact sums, many ties


@pytest.fixture(autouse=True, scope="module", params=[0, composing_budgets._FEW], ids=["searched", "sorted"])
def few(request):
    """All tests take both ways to the best ranks: that of many and that of few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composing_budgets, "_FEW", request.param)
        yield


@st.composite
def ragged_scores(draw, elements=COARSE):
    """Scores of 1 to 4 layers, each with its own number of heads and tokens."""
    shapes = draw(st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 6)), min_size=1, max_size=4))
    return [draw(arrays(np.float32, shape, elements=elements)) for shape in shapes]


def ranked(scores, divisor=None):
    """Naive: every composite token as (score, rank, layer), best first."""
    queue = []
    for layer, values in enumerate(scores):
        heads = [sorted(head.tolist(), reverse=True) for head in values]
        for rank in range(values.shape[1]):
            score = sum(head[rank] for head in heads) / len(heads)
            queue.append((score / divisor[layer] if divisor else score, rank, layer))
    return sorted(queue, key=lambda entry: (-entry[0], entry[1], entry[2]))


def ratios():
    return st.one_of(st.just(1.0), st.integers(1, 999).map(lambda thousandths: thousandths / 1000))


@pytest.mark.parametrize(
    ("keep_ratio", "expected"),
    [
        (0.17, [1, 0]),
        (0.34, [1, 1]),
        (0.5, [2, 1]),
        (0.67, [2, 2]),
        (0.84, [3, 2]),
        (1, [3, 3]),
        (0.1, [0, 0]),
    ],
)
def test_hand_worked(keep_ratio, expected):
    budgets = allocate_layer_budgets(SCORES, keep_ratio)
    assert budgets.tolist() == expected
    assert budgets.dtype == np.int64


def test_hand_worked_options():
    assert allocate_layer_budgets(SCORES, 0.17, min_per_layer=1).tolist() == [1, 1]
    assert allocate_layer_budgets(SCORES, 0.17, min_per_layer=9).tolist() == [3, 3]
    assert allocate_layer_budgets(SCORES[::-1], 0.5).tolist() == [1, 2]
    assert allocate_layer_budgets(SCORES[::-1], 0.5, first_layer_largest=True).tolist() == [2, 1]


def test_ties_go_to_the_lower_rank_then_the_lower_layer():
    flat = np.ones((3, 1, 4), np.float32)
    assert [allocate_layer_budgets(flat, n / 12).tolist() for n in (3, 6)] == [[1, 1, 1], [2, 2, 2]]
    assert allocate_layer_budgets(flat, 0.34).tolist() == [2, 1, 1]
    assert allocate_layer_budgets(flat, 0.42).tolist() == [2, 2, 1]


@given(ragged_scores(), ratios(), st.integers(0, 3))
def test_equals_the_naive_ranking(scores, keep_ratio, min_per_layer):
    queue = ranked(scores)
    kept = queue[: int(len(queue) * Fraction(str(keep_ratio)))]
    expected = [sum(entry[2] == layer for entry in kept) for layer in range(len(scores))]
    assert allocate_layer_budgets(scores, keep_ratio).tolist() == expected

    raised = [max(k, min(min_per_layer, s.shape[1])) for k, s in zip(expected, scores, strict=True)]
    assert allocate_layer_budgets(scores, keep_ratio, min_per_layer=min_per_layer).tolist() == raised


@given(ragged_scores(), ratios())
def test_first_layer_largest_only_gives_to_the_first_layer(scores, keep_ratio):
    plain = allocate_layer_budgets(scores, keep_ratio)
    budgets = allocate_layer_budgets(scores, keep_ratio, first_layer_largest=True)
    assert budgets.sum() == plain.sum()
    assert budgets[0] >= plain[0]
    assert all(budgets[0] >= min(k, scores[0].shape[1]) for k in budgets)


def test_budgets_sum_exactly_for_every_keep_ratio():
    scores = np.random.default_rng(0).random((7, 2, 100), dtype=np.float32)
    for thousandths in range(1, 1001):
        assert allocate_layer_budgets(scores, thousandths / 1000).sum() == 700 * thousandths // 1000


@given(ragged_scores())
def test_keep_1_keeps_everything(scores):
    assert allocate_layer_budgets(scores, 1.0).tolist() == [layer.shape[1] for layer in scores]


def test_arrays_and_lists_of_layers_are_the_same():
    assert allocate_layer_budgets(list(SCORES), 0.5).tolist() == allocate_layer_budgets(SCORES, 0.5).tolist()


@pytest.mark.parametrize("keep_ratio", [0, -0.5, 1.0001, float("nan"), float("inf"), None, "half", "1/0"])
def test_refuses_a_ratio_out_of_range(keep_ratio):
    with pytest.raises(InvalidInput, match="keep ratio"):
        allocate_layer_budgets(SCORES, keep_ratio)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_non_finite_scores(bad):
    scores = SCORES.copy()
    scores[1, 0, 2] = bad
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        allocate_layer_budgets(scores, 0.5)
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        allocate_bytes(scores, [8, 8], 64)


@pytest.mark.parametrize("minimum", [-1, 1.5])
def test_refuses_a_bad_minimum(minimum):
    with pytest.raises(InvalidInput, match="min_per_layer"):
        allocate_layer_budgets(SCORES, 0.5, min_per_layer=minimum)


# bytes


def test_bytes_hand_worked():
    assert allocate_bytes(SCORES, [8, 8], 31).tolist() == [2, 1]
    # for each 8 bytes layer 0 has 6, 4, 1 and layer 1 has 2.5, 1, 0.5
    assert allocate_bytes(SCORES, [8, 16], 16).tolist() == [2, 0]
    assert allocate_bytes(SCORES, [8, 16], 32).tolist() == [2, 1]


def test_a_rank_that_does_not_fit_is_passed_over_for_a_smaller_one():
    # best per byte: layer 0 ranks 0 and 1, layer 1 rank 0 (16 bytes, 15 left), then layer 0 rank 2
    assert allocate_bytes(SCORES, [8, 16], 31).tolist() == [3, 0]


def test_layers_that_cannot_be_composed_get_nothing():
    assert allocate_bytes(SCORES, [0, 8], 1000, min_per_layer=1).tolist() == [0, 3]
    assert allocate_bytes(SCORES, [0, 0], 1000).tolist() == [0, 0]


def test_devices_have_budgets_of_their_own():
    scores = np.concatenate([SCORES, SCORES])
    budgets = allocate_bytes(scores, [8] * 4, [24, 16], device=[0, 1, 1, 0])
    assert budgets.tolist() == [2, 1, 1, 1]  # 6, 5, 4 of layers 0 and 3; 6, 5 of layers 1 and 2
    assert allocate_bytes(scores, [8] * 4, [10**30, 0, 5], device=[0, 1, 1, 0]).tolist() == [3, 0, 0, 3]


@given(ragged_scores(), st.integers(0, 200), st.integers(1, 9))
def test_bytes_of_equal_cells_are_a_count(scores, byte_budget, row_bytes):
    kept = ranked(scores)[: byte_budget // row_bytes]
    expected = [sum(entry[2] == layer for entry in kept) for layer in range(len(scores))]
    assert allocate_bytes(scores, [row_bytes] * len(scores), byte_budget).tolist() == expected


@given(st.data(), ragged_scores(st.floats(0, 1, width=16)), st.integers(1, 3), st.integers(0, 2))
def test_bytes_equal_the_naive_greedy_choice(data, scores, n_devices, min_per_layer):
    per_layer = {"min_size": len(scores), "max_size": len(scores)}
    row_bytes = data.draw(st.lists(st.sampled_from([0, 2, 4, 8]), **per_layer))  # powers of 2 divide exactly
    device = data.draw(st.lists(st.integers(0, n_devices - 1), **per_layer))
    limits = data.draw(st.lists(st.integers(0, 80), min_size=n_devices, max_size=n_devices))

    left = list(limits)
    expected = [0] * len(scores)
    for layer, values in enumerate(scores):
        expected[layer] = min(min_per_layer, values.shape[1]) if row_bytes[layer] else 0
        left[device[layer]] -= expected[layer] * row_bytes[layer]
    if min(left) < 0:
        with pytest.raises(InvalidInput, match="does not hold"):
            allocate_bytes(scores, row_bytes, limits, device, min_per_layer=min_per_layer)
        return
    for _, rank, layer in ranked(scores, divisor=[size or 1 for size in row_bytes]):
        if rank == expected[layer] and 0 < row_bytes[layer] <= left[device[layer]]:
            expected[layer] += 1
            left[device[layer]] -= row_bytes[layer]
    assert min(left) >= 0

    budgets = allocate_bytes(scores, row_bytes, limits, device, min_per_layer=min_per_layer)
    spent = np.bincount(device, budgets * np.array(row_bytes), n_devices)
    assert (spent <= limits).all()
    np.testing.assert_array_equal(budgets, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"row_bytes": [8]},
        {"row_bytes": [8, -8]},
        {"row_bytes": [8.0, 8.0]},
        {"byte_budget": -1},
        {"byte_budget": 1.5},
        {"byte_budget": float("nan")},
        {"byte_budget": [8, 8]},
        {"byte_budget": []},
        {"byte_budget": [8, -8], "device": [0, 1]},
        {"device": [0, 1]},
        {"device": [0]},
        {"device": [0, -1]},
        {"min_per_layer": -1},
        {"min_per_layer": 3},
    ],
)
def test_refuses_wrong_sizes_and_limits(arguments):
    with pytest.raises(InvalidInput):
        allocate_bytes(**{"scores": SCORES, "row_bytes": [8, 8], "byte_budget": 16, **arguments})


# composite tokens


def test_composites_hand_worked():
    worths = [np.array([6.0, 4.0, 1.0], np.float32), np.array([5.0, 2.0, 1.0], np.float32)]
    assert [allocate_composites(worths, [8, 8], n * 8).tolist() for n in range(5)] == [
        [0, 0],
        [1, 0],
        [1, 1],
        [2, 1],
        [2, 2],
    ]


def test_a_quarter_of_the_cells_is_shared_out_evenly():
    worths = [np.full(100, 0.001, np.float32), np.full(100, 1.0, np.float32)]
    assert allocate_composites(worths, [8, 8], 800).tolist() == [12, 88]
    # each device's own limit counts, and what a layer lacks goes to the others
    assert allocate_composites(worths, [8, 8], [80, 800], device=[0, 1]).tolist() == [10, 100]
    assert allocate_composites([worths[0][:2], worths[1]], [8, 8], 800).tolist() == [2, 98]
    assert allocate_composites(worths, [0, 8], 400).tolist() == [0, 50]


@given(ragged_scores(st.floats(0, 1, width=16)), st.integers(0, 400), st.integers(1, 9))
def test_budgets_of_composites_fill_their_limit(scores, byte_budget, row_bytes):
    worths = [np.sort(layer.mean(axis=0))[::-1].astype(np.float32) for layer in scores]
    budgets = allocate_composites(worths, [row_bytes] * len(worths), byte_budget)
    available = [len(worth) for worth in worths]
    assert budgets.sum() == min(byte_budget // row_bytes, sum(available))
    floor = byte_budget // 4 // (row_bytes * len(worths))
    assert all(min(floor, n) <= budget <= n for budget, n in zip(budgets, available, strict=True))


@pytest.mark.parametrize("byte_budget", [-1, float("nan")])
def test_composites_refuse_what_is_no_limit(byte_budget):
    with pytest.raises(InvalidInput):
        allocate_composites([np.ones(3, np.float32)] * 2, [8, 8], byte_budget)


def test_budgets_in_steps_fill_whole_groups_of_rows() -> None:
    worths = [np.sort(np.random.default_rng(i).random(4000).astype(np.float32) * (i + 1))[::-1] for i in range(3)]
    limit = 3 * 1500 * 8
    budgets = allocate_composites(worths, [8, 8, 8], [limit], [0, 0, 0], steps=(256,), n_beside=200)
    assert ((budgets + 200) % 256 == 0).all()
    assert (np.diff(budgets) > 0).all(), "what is worth more gets more"
    assert limit - 3 * 256 * 8 < budgets.sum() * 8 <= limit
    finest = allocate_composites(worths, [8, 8, 8], [limit], [0, 0, 0])
    assert np.abs(budgets - finest).max() <= 256


def test_steps_that_are_too_coarse_or_drop_what_must_stay_are_left_out() -> None:
    worths = [np.linspace(1, 0, 900, dtype=np.float32)] * 2
    finest = allocate_composites(worths, [8, 8], [2 * 500 * 8], [0, 0]).tolist()
    assert allocate_composites(worths, [8, 8], [2 * 500 * 8], [0, 0], steps=(256,), n_beside=100).tolist() == finest
    few = [worths[0], worths[0][:120]]
    stepped = allocate_composites(few, [8, 8], [2 * 800 * 8], [0, 0], steps=(256,), n_beside=256)
    assert stepped[1] == 0
    kept = allocate_composites(few, [8, 8], [2 * 800 * 8], [0, 0], steps=(256,), n_beside=256, at_least=100)
    assert kept[1] == 120
    mixed = allocate_composites(
        [worths[0], worths[0]], [8, 8], [700 * 8, 800 * 8], [0, 1], steps=(1, 256), n_beside=256
    )
    assert mixed.tolist() == [700, 768]
