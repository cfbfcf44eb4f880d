"""Which layers, heads and tokens of a student are compared with which of a teacher's, and the losses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsd import QsdError
from qsd.distillation import (
    AttentionMaps,
    attention_loss,
    logits_loss,
    match_layers,
    match_maps,
    similarity_distance,
    token_similarity,
)


@given(st.integers(1, 40), st.integers(1, 40))
def test_layers_are_matched_evenly_and_the_last_with_the_last(students, teachers):
    matched = match_layers(students, teachers)
    assert len(matched) == students
    assert matched == sorted(matched)
    assert matched[-1] == teachers - 1
    assert set(matched) <= set(range(teachers))
    if students <= teachers:
        assert len(set(matched)) == students
    for student, teacher in enumerate(matched):  # at most a layer off the same relative depth
        assert 0 <= (teacher + 1) / teachers - (student + 1) / students < 1 / teachers


def test_layers_by_example():
    assert match_layers(8, 8) == list(range(8))
    assert match_layers(4, 12) == [2, 5, 8, 11]
    assert match_layers(4, 2) == [0, 0, 1, 1]


@pytest.mark.parametrize(("heads", "teacher_heads", "groups"), [(8, 8, 8), (8, 12, 4), (8, 3, 1), (2, 4, 2), (6, 4, 2)])
def test_heads_that_differ_are_joined_and_their_similarities_add_up(heads, teacher_heads, groups):
    student, teacher = torch.randn(2, heads, 5, 3, 4), torch.randn(2, teacher_heads, 7, 3, 4)
    matched = match_maps(student, teacher)
    for joined, x in zip(matched, (student, teacher)):
        assert joined.shape == (2, groups, x[0, :, :, 0, 0].numel() // groups, 12)
        tokens = x.flatten(-2)
        sums = (tokens.transpose(-1, -2) @ tokens).unflatten(1, (groups, -1)).sum(2)
        expected = sums / sums.norm(dim=(-1, -2), keepdim=True)
        torch.testing.assert_close(token_similarity(joined), expected)


def test_the_finer_grid_is_averaged_down_to_the_coarser():
    fine, coarse = torch.randn(2, 2, 3, 8, 8), torch.randn(2, 2, 3, 4, 4)
    means = fine.unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).mean((-1, -3))
    for student, teacher in ((fine, coarse), (coarse, fine)):
        pair = match_maps(student, teacher)
        averaged, kept = pair if student is fine else pair[::-1]
        torch.testing.assert_close(averaged, means.flatten(-2))
        assert torch.equal(kept, coarse.flatten(-2))


def test_grids_that_do_not_divide_each_other_are_matched_where_their_proportions_agree():
    student, teacher = match_maps(torch.randn(1, 1, 3, 14, 14), torch.randn(1, 1, 3, 10, 10))
    assert student.shape == teacher.shape == (1, 1, 3, 100)
    student, teacher = match_maps(torch.randn(1, 1, 3, 15, 20), torch.randn(1, 1, 3, 8, 10))  # rounded up from 7.5
    assert student.shape == teacher.shape == (1, 1, 3, 80)


@pytest.mark.parametrize(
    ("grid", "teacher_grid", "message"),
    [
        ((4, 8), (8, 4), "grids of 4x8 .* and 8x4 .* different proportions"),
        ((14, 14), (7, 14), "different proportions"),
        ((14, 14), (14, 7), "different proportions"),
        ((1, 1), (7, 7), "a single token resembles only itself"),
    ],
)
def test_grids_that_make_no_sense_together_are_refused(grid, teacher_grid, message):
    with pytest.raises(QsdError, match=message):
        match_maps(torch.randn(1, 2, 3, *grid), torch.randn(1, 2, 3, *teacher_grid))


def maps(layers, heads=2, grid=(3, 3)):
    return [AttentionMaps(*torch.randn(3, 2, heads, 5, *grid)) for _ in range(layers)]


def test_the_loss_is_the_sum_over_layers_and_heads_and_the_mean_over_images():
    students, teachers = maps(2), maps(4)
    losses = attention_loss(students, teachers)
    for name in ("query", "key", "value"):
        expected = sum(
            similarity_distance(getattr(s, name)[b : b + 1].flatten(-2), getattr(t, name)[b : b + 1].flatten(-2)).sum()
            for b in range(2)
            for s, t in zip(students, teachers[1::2])
        )
        assert losses[name].item() == pytest.approx(expected.item() / 2, rel=1e-5)


def test_soft_logits_are_hinton_s_loss_and_hard_ones_cross_entropy():
    student, teacher = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[0.0, 3.0, 1.0]])

    def softmax(values, temperature):
        exponentials = [math.exp(v / temperature) for v in values]
        return [e / sum(exponentials) for e in exponentials]

    p, q = softmax([0, 3, 1], 2), softmax([1, 2, 0.5], 2)
    divergence = sum(a * math.log(a / b) for a, b in zip(p, q))
    assert logits_loss(student, teacher, temperature=2.0).item() == pytest.approx(4 * divergence, rel=1e-5)
    hard = logits_loss(student, teacher, kind="hard").item()
    assert hard == pytest.approx(-math.log(softmax([1, 2, 0.5], 1)[1]), rel=1e-5)
    assert logits_loss(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
