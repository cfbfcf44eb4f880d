"""The distance of token similarities against slow oracles, and the mathematics that it promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qsd.distillation import similarity_distance, token_similarity

# Tokens outnumber twice the channels (d x d matrices), or do not (N x N); the teacher is wider, narrower, as wide.
SHAPES = [(4, 4, 30), (4, 7, 30), (7, 4, 30), (6, 6, 12), (9, 5, 7), (5, 9, 7), (1, 1, 3)]


def slow_distance(student, teacher):
    """Token by token, head by head, in float64."""
    student, teacher = (np.asarray(x, dtype=np.float64) for x in (student, teacher))
    images, heads, _, tokens = student.shape
    result = np.zeros((images, heads))
    for image in range(images):
        for head in range(heads):
            similarities = []
            for x in (student[image, head], teacher[image, head]):
                similarity = np.array([[np.sum(x[:, i] * x[:, j]) for j in range(tokens)] for i in range(tokens)])
                norm = np.sqrt(np.sum(similarity**2))
                similarities.append(similarity / norm if norm > 0 else similarity)
            result[image, head] = np.sum((similarities[0] - similarities[1]) ** 2)
    return result


def pair(shape, dtype=torch.float64, seed=0):
    channels, other, tokens = shape
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, d, tokens, generator=generator, dtype=dtype) for d in (channels, other))


@pytest.mark.parametrize("shape", SHAPES)
def test_distance_equals_the_slow_oracle(shape):
    student, teacher = pair(shape)
    assert np.abs(similarity_distance(student, teacher).numpy() - slow_distance(student, teacher)).max() < 1e-10
    single = similarity_distance(student.float(), teacher.float()).numpy()
    assert np.abs(single - slow_distance(student.float(), teacher.float())).max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_distance_is_two_minus_two_cosines_of_the_similarities(shape):
    student, teacher = pair(shape)
    cosine = (token_similarity(student) * token_similarity(teacher)).sum((-1, -2))
    torch.testing.assert_close(similarity_distance(student, teacher), 2 - 2 * cosine, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_the_numerical_one(shape):
    student, teacher = pair(shape)
    assert torch.autograd.gradcheck(lambda x: similarity_distance(x, teacher), student.requires_grad_())


@pytest.mark.parametrize("shape", [(4, 4, 30), (6, 6, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_student_and_teacher_that_agree_have_distance_and_gradient_zero_exactly(shape, dtype):
    student, _ = pair(shape, dtype)
    student.requires_grad_()
    distance = similarity_distance(student, student.detach().clone())
    distance.sum().backward()
    assert torch.equal(distance, torch.zeros_like(distance))
    assert not student.grad.any()


@pytest.mark.parametrize("shape", [(4, 4, 30), (6, 6, 12)])
def test_near_identity_single_precision_keeps_its_digits(shape):
    # Features that differ by 1e-3 are 1e-6 apart; 2 - 2 cos in float32 (unit roundoff 6e-8) would be wrong by a tenth.
    student, noise = pair(shape, torch.float32)
    teacher = student + 1e-3 * noise
    expected = torch.from_numpy(slow_distance(student, teacher))
    assert expected.max() < 1e-5
    torch.testing.assert_close(similarity_distance(student, teacher).double(), expected, rtol=3e-4, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 1000), st.floats(-8, 8), st.floats(-8, 8))
def test_neither_scale_nor_rotation_of_channels_nor_order_of_tokens_matters(shape, seed, exponent, other_exponent):
    student, teacher = pair(shape, seed=seed)
    expected = similarity_distance(student, teacher)
    assert ((expected >= 0) & (expected <= 2)).all()
    rotations = [torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0] for d in shape[:2]]
    order = torch.randperm(shape[2])
    changed = [
        10.0**power * (rotation @ x)[..., order]
        for x, rotation, power in zip((student, teacher), rotations, (exponent, other_exponent))
    ]
    torch.testing.assert_close(similarity_distance(*changed), expected, rtol=1e-9, atol=1e-9)
    swapped = similarity_distance(teacher, student)
    torch.testing.assert_close(swapped, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("shape", [(4, 4, 30), (6, 6, 12)])
def test_features_of_any_size_fit_into_single_precision(shape, scale):
    # the fourth powers of such features, which norms of similarities are made of, do not
    student, teacher = pair(shape, torch.float32)
    expected = similarity_distance(student, teacher)
    torch.testing.assert_close(similarity_distance(student * scale, teacher), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(similarity_distance(student, teacher * scale), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 4, 30), (6, 6, 12)])
def test_a_silent_head_has_similarity_zero_and_no_gradient(shape):
    student, teacher = pair(shape)
    student[0, 0] = 0  # alone
    teacher[0, 1] = 0  # the teacher's
    student[1, 2] = teacher[1, 2] = 0  # both
    student.requires_grad_()
    distance = similarity_distance(student, teacher)
    assert np.abs(distance.detach().numpy() - slow_distance(student.detach(), teacher)).max() < 1e-10
    assert distance[0, :2].tolist() == pytest.approx([1, 1])
    assert distance[1, 2] == 0
    distance.sum().backward()
    assert torch.isfinite(student.grad).all()
    assert not student.grad[0, :2].any()
    assert not student.grad[1, 2].any()
    assert student.grad[0, 2].any()
    assert not token_similarity(student)[0, 0].any()


def test_nothing_flows_into_the_teacher():
    student, teacher = (x.requires_grad_() for x in pair((4, 4, 30)))
    similarity_distance(student, teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


def test_a_descent_along_the_gradient_reaches_the_teacher_s_similarity():
    student, teacher = pair((4, 4, 30))
    student.requires_grad_()
    start = similarity_distance(student, teacher).mean().item()
    optimizer = torch.optim.Adam([student], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        similarity_distance(student, teacher).mean().backward()
        optimizer.step()
    assert similarity_distance(student, teacher).mean() < 0.01 * start


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_compared_in_single_precision(dtype):
    student, teacher = (x.to(dtype) for x in pair((4, 4, 30)))
    expected = similarity_distance(student.float(), teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        got = similarity_distance(student.requires_grad_(), teacher)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    got.sum().backward()
    assert student.grad.dtype == dtype


@pytest.mark.parametrize("shape", [(4, 4, 30), (6, 6, 12)])
def test_one_tensor_of_the_student_s_size_is_kept_for_the_backward_pass(shape):
    student, teacher = pair(shape)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        similarity_distance(student.requires_grad_(), teacher)
    assert kept == [student.numel()]


def test_no_token_by_token_matrix_is_built_where_channels_are_few():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
            return result

    student, teacher = torch.randn(2, 1, 1, 8, 400)
    with Largest() as watch:
        similarity_distance(student.requires_grad_(), teacher).sum().backward()
    assert watch.numel == 8 * 400  # not 400 * 400
