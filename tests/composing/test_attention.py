import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompose_local.composing.attention import AttentionMax
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


@given(
    seed=st.integers(0, 2**32 - 1),
    n_heads=st.integers(1, 3),
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    as_indices=st.booleans(),
)
def test_any_split_into_micro_batches_gives_the_naive_maximum(seed, n_heads, sizes, as_indices):
    """A text read in micro-batches: each sees the columns there are by then, in cells of any order."""
    n_tokens = sum(sizes)
    random = np.random.default_rng(seed)
    weights = np.tril(softmax_like(seed, n_heads, n_tokens, n_tokens))  # causal, (Q, T, T)
    expected = np.zeros((n_heads, n_tokens), np.float32)
    for query in range(n_tokens):
        for token in range(n_tokens):
            for head in range(n_heads):
                expected[head, token] = max(expected[head, token], weights[head, query, token])

    seen = AttentionMax(1, n_heads)
    done = 0
    for size in sizes:
        batch = slice(done, done + size)
        done += size
        cells = np.full((n_heads, size, done + 3), 9, np.float32)  # 9s stand in cells of others
        place = random.permutation(done + 3)[:done] if as_indices else np.arange(done) + 1
        cells[:, :, place] = weights[:, batch, :done]
        seen.update(0, cells, place if as_indices else slice(1, done + 1))
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
def test_refuses_non_finite_weights_and_stays_as_it_was(bad):
    weights = softmax_like(3, 2, 3, 6)
    seen = AttentionMax(1, 2)
    seen.update(0, weights, slice(0, 6))
    before = seen.stacked()
    weights[1, 2, 4] = bad
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        seen.update(0, weights, slice(0, 6))
    np.testing.assert_array_equal(seen.stacked(), before)


def test_does_not_look_at_columns_that_are_not_kept():
    weights = softmax_like(4, 1, 2, 4)
    weights[0, :, 3] = np.nan
    seen = AttentionMax(1, 1)
    seen.update(0, weights, slice(0, 3))
    seen.update(0, weights, np.array([0, 1, 2]))
    np.testing.assert_array_equal(seen.result()[0], weights.max(axis=1)[:, :3])


@pytest.mark.parametrize(
    ("n_layers", "n_heads", "group"), [(0, 1, 1), (1, 0, 1), (2, [1], 1), (2, [1, 0], 1), (1, 1, 0)]
)
def test_refuses_a_wrong_shape_of_model(n_layers, n_heads, group):
    with pytest.raises(InvalidInput):
        AttentionMax(n_layers, n_heads, group=group)


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
    ],
)
def test_refuses_an_update_that_does_not_fit(arguments):
    good = {"layer": 0, "weights": np.ones((2, 3, 5), np.float32), "columns": np.array([0, 1])}
    seen = AttentionMax(1, 2)
    seen.update(**good)
    with pytest.raises(InvalidInput):
        seen.update(**{**good, **arguments})


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_query_heads_that_share_a_kv_head_count_with_their_mean(dtype):
    layers = [LayerShape(0, 4, 2, 8), LayerShape(1, 6, 2, 8)]
    seen = AttentionMax.over(layers, dtype)
    for layer, shape in enumerate(layers):
        weights = softmax_like(layer, shape.n_heads, 3, 5)
        seen.update(layer, weights, slice(0, 5))
        expected = weights.max(axis=1).reshape(2, -1, 5).mean(axis=1)
        np.testing.assert_allclose(seen.of_layer(layer), expected, rtol=1e-3)
        assert seen.of_layer(layer).dtype == dtype
