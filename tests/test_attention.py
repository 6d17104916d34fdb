import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompose_local.attention import AttentionMax
from kvcompose_local.errors import InvalidInput
from kvcompose_local.interfaces import LayerShape


def softmax_like(seed, n_heads, n_queries, n_kv):
    return np.random.default_rng(seed).random((n_heads, n_queries, n_kv), dtype=np.float32)


def test_hand_worked():
    seen = AttentionMax(n_layers=2, n_heads=1)
    seen.update(0, np.array([[[0.1, 0.9, 0.0], [0.3, 0.2, 0.5]]], np.float32), slice(0, 2))
    seen.update(0, np.array([[[0.2, 0.1, 0.7]]], np.float32), slice(0, 3))
    np.testing.assert_allclose(seen.result()[0], [[0.3, 0.9, 0.7]])
    assert seen.result()[0].dtype == np.float32
    assert seen.result()[1].shape == (1, 0)


def test_hand_worked_without_the_nearest():
    seen = AttentionMax(1, 1, exclude_nearest=2)
    weights = np.array([[[0.6, 0.4, 0.0, 0.0], [0.2, 0.3, 0.5, 0.0], [0.1, 0.2, 0.3, 0.4]]], np.float32)
    seen.update(0, weights, slice(0, 4), np.arange(1, 4), np.arange(4))
    np.testing.assert_allclose(seen.result()[0], [[0.2, 0.2, 0.0, 0.0]])


@given(
    seed=st.integers(0, 2**32 - 1),
    n_heads=st.integers(1, 3),
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    exclude_nearest=st.integers(0, 4),
    as_indices=st.booleans(),
)
def test_any_split_into_micro_batches_gives_the_naive_maximum(seed, n_heads, sizes, exclude_nearest, as_indices):
    """A text read in micro-batches: each sees the columns there are by then, in cells of any order."""
    n_tokens = sum(sizes)
    random = np.random.default_rng(seed)
    weights = np.tril(softmax_like(seed, n_heads, n_tokens, n_tokens))  # causal, (Q, T, T)
    positions = random.integers(0, 50) + np.arange(n_tokens)
    expected = np.zeros((n_heads, n_tokens), np.float32)
    for query in range(n_tokens):
        for token in range(n_tokens):
            if exclude_nearest == 0 or query - token >= exclude_nearest:
                for head in range(n_heads):
                    expected[head, token] = max(expected[head, token], weights[head, query, token])

    seen = AttentionMax(1, n_heads, exclude_nearest)
    done = 0
    for size in sizes:
        batch = slice(done, done + size)
        done += size
        cells = np.full((n_heads, size, done + 3), 9, np.float32)  # 9s stand in cells of others
        place = random.permutation(done + 3)[:done] if as_indices else np.arange(done) + 1
        cells[:, :, place] = weights[:, batch, :done]
        columns = place if as_indices else slice(1, done + 1)
        seen.update(0, cells, columns, positions[batch], positions[:done])
    np.testing.assert_array_equal(seen.stacked()[0], expected)


def test_reads_strided_and_read_only_memory():
    backing = softmax_like(0, 8, 6, 40)
    view = backing.transpose(1, 0, 2)[::2, 1:5, ::2]  # Q=3, 4 queries, 20 columns
    view.flags.writeable = False
    seen = AttentionMax(1, 3)
    seen.update(0, view, slice(None, None, 2))
    np.testing.assert_array_equal(seen.result()[0], view.max(axis=1)[:, ::2])
    kept = seen.result()[0].copy()
    backing[:] = 0
    np.testing.assert_array_equal(seen.result()[0], kept)


def test_fewer_columns_touch_only_the_first():
    weights = softmax_like(1, 2, 3, 5)
    seen = AttentionMax(1, 2)
    seen.update(0, weights, slice(0, 5))
    seen.update(0, weights + 1, slice(0, 2))
    expected = weights.max(axis=1)
    expected[:, :2] += 1
    np.testing.assert_allclose(seen.result()[0], expected, rtol=1e-6)


def test_layers_may_differ_in_heads():
    seen = AttentionMax(2, [1, 3])
    seen.update(1, softmax_like(2, 3, 2, 4), slice(0, 4))
    assert [layer.shape for layer in seen.result()] == [(1, 0), (3, 4)]
    with pytest.raises(InvalidInput, match="layer by layer"):
        seen.stacked()


def test_stacked():
    seen = AttentionMax(2, 3)
    for layer in range(2):
        seen.update(layer, softmax_like(layer, 3, 2, 4), slice(0, 4))
    assert seen.stacked().shape == (2, 3, 4)
    np.testing.assert_array_equal(seen.stacked()[1], softmax_like(1, 3, 2, 4).max(axis=1))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("exclude_nearest", [0, 2])
def test_refuses_non_finite_weights_and_stays_as_it_was(bad, exclude_nearest):
    weights = softmax_like(3, 2, 3, 6)
    positions = {"query_positions": np.arange(10, 13), "column_positions": np.arange(6)}
    seen = AttentionMax(1, 2, exclude_nearest)
    seen.update(0, weights, slice(0, 6), **positions)
    before = seen.stacked()
    weights[1, 2, 4] = bad
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        seen.update(0, weights, slice(0, 6), **positions)
    np.testing.assert_array_equal(seen.stacked(), before)


def test_does_not_look_at_columns_that_are_not_kept():
    weights = softmax_like(4, 1, 2, 4)
    weights[0, :, 3] = np.nan
    seen = AttentionMax(1, 1)
    seen.update(0, weights, slice(0, 3))
    seen.update(0, weights, np.array([0, 1, 2]))
    np.testing.assert_array_equal(seen.result()[0], weights.max(axis=1)[:, :3])


@pytest.mark.parametrize(
    ("n_layers", "n_heads", "exclude_nearest"),
    [(0, 1, 0), (1, 0, 0), (2, [1], 0), (2, [1, 0], 0), (1, 1, -1)],
)
def test_refuses_a_wrong_shape_of_model(n_layers, n_heads, exclude_nearest):
    with pytest.raises(InvalidInput):
        AttentionMax(n_layers, n_heads, exclude_nearest)


@pytest.mark.parametrize(
    "arguments",
    [
        {"layer": 1},
        {"layer": -1},
        {"weights": np.ones((2, 5), np.float32)},
        {"weights": np.ones((3, 3, 5), np.float32)},
        {"weights": np.ones((2, 3, 5), np.float64)},
        {"columns": np.array([0, 5])},
        {"columns": np.array([-1, 0])},
        {"columns": np.array([0.0, 1.0])},
        {"columns": np.array([True, False, True, False, False])},
        {"columns": np.array([[0, 1]])},
        {"first": -1},
        {"column_positions": None},
        {"query_positions": np.arange(2)},
        {"column_positions": np.arange(5)},
    ],
)
def test_refuses_an_update_that_does_not_fit(arguments):
    good = {
        "layer": 0,
        "weights": np.ones((2, 3, 5), np.float32),
        "columns": np.array([0, 1]),
        "query_positions": np.arange(5, 8),
        "column_positions": np.arange(2),
    }
    seen = AttentionMax(1, 2, exclude_nearest=1)
    seen.update(**good)
    with pytest.raises(InvalidInput):
        seen.update(**{**good, **arguments})


def test_columns_from_a_number_on_and_without_positions():
    seen = AttentionMax(1, 1, exclude_nearest=2)
    seen.update(0, np.full((1, 2, 3), 0.5, np.float32), slice(None), first=2)
    seen.update(0, np.full((1, 1, 4), 0.25, np.float32), slice(0, 3), np.array([5]), np.array([3, 4, 5]), first=1)
    assert seen.result()[0].tolist() == [[0, 0.25, 0.5, 0.5, 0.5]]
    seen.pick(0, np.array([[4, 1, 7]]))
    assert seen.result()[0].tolist() == [[0.5, 0.25, 0]]
    seen.trim([2])
    seen.update(0, np.full((1, 1, 3), 0.125, np.float32), slice(None))
    assert seen.result()[0].tolist() == [[0.5, 0.25, 0.125]]


def test_query_heads_that_share_a_kv_head_count_with_their_mean():
    weights, later = softmax_like(5, 6, 4, 9), softmax_like(6, 6, 4, 9)
    expected = np.maximum(*(w.max(axis=1).reshape(2, 3, 9).mean(axis=1) for w in (weights, later)))
    seen = AttentionMax(1, 2, group=3)
    seen.update(0, weights, slice(None))
    for head in (0, 3):  # one KV head at a time
        seen.update(0, later[head : head + 3], slice(None), head=head)
    np.testing.assert_array_equal(seen.result()[0], expected)
    for wrong in ({"weights": weights[:2]}, {"weights": weights[:3], "head": 1}, {"weights": weights, "head": 3}):
        with pytest.raises(InvalidInput, match=r"\(6, queries, cells\)"):
            seen.update(0, **{"columns": slice(None), **wrong})
    np.testing.assert_array_equal(seen.result()[0], expected)
    layers = (LayerShape(0, 4, 2, 1024), LayerShape(1, 4, 4, 1024))
    assert [layer.shape for layer in AttentionMax.over(layers).result()] == [(2, 0), (4, 0)]


def test_half_precision_ranks_the_same():
    weights = softmax_like(4, 3, 5, 40)
    whole, half = AttentionMax(1, 3), AttentionMax(1, 3, dtype=np.float16)
    for seen in (whole, half):
        seen.update(0, weights, slice(None))
    assert half.result()[0].dtype == np.float16
    np.testing.assert_allclose(half.result()[0], whole.result()[0], rtol=1e-3)


def test_a_byte_keeps_the_order_and_what_was_taken_back():
    weights = softmax_like(4, 3, 5, 40)
    weights[0, :, 0], weights[1, :, 1] = 1.0, 0.0
    whole, coarse = AttentionMax(1, 3), AttentionMax(1, 3, dtype=np.uint8)
    for part in (slice(0, 2), slice(2, 5)):
        for seen in (whole, coarse):
            seen.update(0, weights[:, part], slice(None))
    exact, kept = whole.result()[0], coarse.result()[0].astype(np.float32)
    assert (kept[0, 0], kept[1, 1]) == (1, 0)
    np.testing.assert_allclose(kept, exact, rtol=1 / 16, atol=2.0**-17)
    assert (np.diff(kept.ravel()[np.argsort(exact, axis=None)]) >= 0).all()
    again = AttentionMax(1, 3, dtype=np.uint8)
    again.take_back([kept])
    np.testing.assert_array_equal(again.result()[0], kept)


@pytest.mark.parametrize("dtype", [np.float16, np.uint8])
def test_picked_columns_leave_room_for_as_many_as_are_asked_for(dtype: type):
    seen = AttentionMax(1, 2, dtype=dtype)
    seen.update(0, np.full((2, 1, 6), 0.5, np.float32), slice(None))
    seen.pick(0, np.array([[0, 1, 2]]), 4)
    room = seen._room[0]
    seen.update(0, np.full((2, 1, 4), 0.25, np.float32), slice(None), first=3)
    assert seen._room[0] is room
    assert seen.n_columns == (7,)
    assert seen.result()[0].tolist() == [[0.5] * 3 + [0.25] * 4] * 2
